"""The mean of the members.

References
----------
.. [1] Coste et al. 2023, arXiv 2310.02743.
"""

from __future__ import annotations

from collections.abc import Mapping

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import Rule, SortedScores

RULE = Rule("mean", SortedScores.mean)


def mean(*, weights: Mapping[str, float] | None = None) -> Aggregator:
    """Mean of the members: cheap averaging, no protection against shared blind spots [1]_.

    Parameters
    ----------
    weights : mapping of str to float, optional
        Weight of each member by its name, ≥ 0.

    Returns
    -------
    Aggregator
        Σ wᵢrᵢ, the weights wᵢ scaled to sum 1; (1/k) Σ rᵢ without weights.

    References
    ----------
    .. [1] Coste et al. 2023, arXiv 2310.02743.
    """
    return make_aggregator("mean", weights=weights)
