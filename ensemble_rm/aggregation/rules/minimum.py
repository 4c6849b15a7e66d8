"""The lowest member.

References
----------
.. [1] Coste et al. 2023, arXiv 2310.02743: worst-case optimisation (WCO).
"""

from __future__ import annotations

from collections.abc import Mapping

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import Rule, SortedScores

RULE = Rule("minimum", SortedScores.lowest)


def minimum(*, weights: Mapping[str, float] | None = None) -> Aggregator:
    """Lowest member: worst-case optimisation (WCO) [1]_.

    Parameters
    ----------
    weights : mapping of str to float, optional
        Weight of each member by its name, ≥ 0. A member of weight 0 is left out; otherwise
        weights change nothing.

    Returns
    -------
    Aggregator
        min rᵢ over the members of weight above 0.

    References
    ----------
    .. [1] Coste et al. 2023, arXiv 2310.02743.
    """
    return make_aggregator("minimum", weights=weights)
