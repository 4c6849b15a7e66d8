"""A quantile of the members, interpolated between ranks."""

from __future__ import annotations

from collections.abc import Mapping

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import Coefficient, Rule, SortedScores
from ensemble_rm.arrays import Floats


def weighted_quantile(scores: SortedScores, q: float) -> Floats:
    """Return the weighted type-7 quantile of each row, shape (n_samples,).

    Akinshin 2023, arXiv 2304.07265: the mean of the weighted empirical quantile function over a
    window of width 1/n* that starts at q(1 − 1/n*), where n* = (Σ wᵢ)² / Σ wᵢ² is Kish's
    effective number of members. Equal weights give n* = k and numpy's default interpolation.
    The result is continuous in every score, which a quantile that interpolates between weighted
    ranks is not: there, two members that swap places make it jump.
    """
    width = (scores.weights**2).sum(axis=1) / scores.total
    start = q * (scores.total - width)
    return scores.mean_between(start, start + width)


Q = Coefficient(
    "q",
    "a number in [0, 1]",
    lambda value: 0 <= value <= 1,
    "quantile of the members",
    (("minimum", 0), ("maximum", 1)),
)
RULE = Rule("quantile", weighted_quantile, (Q,))


def quantile(q: float, *, weights: Mapping[str, float] | None = None) -> Aggregator:
    """Quantile of the members, interpolated linearly between ranks as numpy does.

    Parameters
    ----------
    q : float
        In [0, 1]; 0 is the minimum, ½ the median.
    weights : mapping of str to float, optional
        Weight of each member by its name, ≥ 0.

    Returns
    -------
    Aggregator
        The q-quantile. With weights, Akinshin's weighted type-7 quantile [1]_: the mean of the
        weighted empirical quantile function over [q(1 − 1/n*), q(1 − 1/n*) + 1/n*], with
        n* = (Σ wᵢ)²/Σ wᵢ² the effective number of members. It is continuous in the scores; q = 0
        is the mean of the lowest 1/n* of the weight, no longer the minimum.

    References
    ----------
    .. [1] Akinshin 2023, arXiv 2304.07265: weighted quantile estimators.
    """
    return make_aggregator("quantile", q=q, weights=weights)
