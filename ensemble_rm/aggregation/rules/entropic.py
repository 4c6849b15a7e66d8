"""The entropic aggregator, a soft minimum."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import Coefficient, Rule, SortedScores
from ensemble_rm.arrays import Floats


def _formula(scores: SortedScores, beta: float) -> Floats:
    lowest = scores.lowest()
    above = np.where(scores.present, scores.values - lowest[:, None], 0.0)
    # log-sum-exp about the minimum; expm1 and log1p keep the digits that a large β would cost.
    soft: Floats = lowest - beta * np.log1p(scores.average(np.expm1(-above / beta)))
    return np.clip(soft, lowest, scores.mean())


BETA = Coefficient(
    "beta",
    "a finite number > 0",
    lambda value: value > 0,
    "β of entropic: low is near the minimum, high near the mean",
    (("exclusiveMinimum", 0),),
)
RULE = Rule("entropic", _formula, (BETA,))


def entropic(beta: float, *, weights: Mapping[str, float] | None = None) -> Aggregator:
    """Soft minimum, between minimum (β → 0) and mean (β → ∞); never below the minimum [1]_.

    Parameters
    ----------
    beta : float
        β > 0, in normalised units.
    weights : mapping of str to float, optional
        Weight of each member by its name, ≥ 0.

    Returns
    -------
    Aggregator
        −β log Σ wᵢ exp(−rᵢ/β), the weights wᵢ scaled to sum 1; 1/k each without weights.

    References
    ----------
    .. [1] arXiv 2606.09073.
    """
    return make_aggregator("entropic", beta=beta, weights=weights)
