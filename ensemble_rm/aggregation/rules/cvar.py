"""Conditional value at risk: the mean of the lowest members."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import Coefficient, Rule, SortedScores
from ensemble_rm.arrays import Floats


def _formula(scores: SortedScores, alpha: float) -> Floats:
    tail = scores.mean_between(np.zeros_like(scores.total), alpha * scores.total)
    return np.minimum(tail, scores.mean())


ALPHA = Coefficient(
    "alpha",
    "a number in (0, 1]",
    lambda value: 0 < value <= 1,
    "α of cvar: share of the lowest members",
    (("exclusiveMinimum", 0), ("maximum", 1)),
)
RULE = Rule("cvar", _formula, (ALPHA,))


def cvar(alpha: float, *, weights: Mapping[str, float] | None = None) -> Aggregator:
    """Mean of the lowest share of the members: conditional value at risk [1]_.

    Parameters
    ----------
    alpha : float
        In (0, 1], the share of members; a member may count in part. 1 is the mean.
    weights : mapping of str to float, optional
        Weight of each member by its name, ≥ 0.

    Returns
    -------
    Aggregator
        (1/α) ∫₀^α F⁻¹(u) du, F⁻¹ the (weighted) empirical quantile function: without weights the
        mean of the lowest α·k members; with them, of the lowest members that hold the share α of
        the weight.

    References
    ----------
    .. [1] Rockafellar & Uryasev 2000: conditional value at risk (CVaR).
    """
    return make_aggregator("cvar", alpha=alpha, weights=weights)
