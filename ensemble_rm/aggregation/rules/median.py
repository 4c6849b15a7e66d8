"""The median of the members."""

from __future__ import annotations

from collections.abc import Mapping

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import Rule, SortedScores
from ensemble_rm.aggregation.rules.quantile import weighted_quantile
from ensemble_rm.arrays import Floats


def _formula(scores: SortedScores) -> Floats:
    return weighted_quantile(scores, 0.5)


RULE = Rule("median", _formula)


def median(*, weights: Mapping[str, float] | None = None) -> Aggregator:
    """Median of the members: one broken member does not move it far.

    Parameters
    ----------
    weights : mapping of str to float, optional
        Weight of each member by its name, ≥ 0.

    Returns
    -------
    Aggregator
        The middle score, or the mean of the two in the middle. With weights, the ½-quantile as
        `quantile` defines it.
    """
    return make_aggregator("median", weights=weights)
