"""Uncertainty-weighted optimisation: the mean less a multiple of the variance."""

from __future__ import annotations

from collections.abc import Mapping

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import Coefficient, Rule, SortedScores
from ensemble_rm.arrays import Floats


def _formula(scores: SortedScores, lam: float) -> Floats:
    # λ = 0 is the mean, also of a single member, which has no variance.
    return scores.mean() if lam == 0 else scores.mean() - lam * scores.variance()


LAM = Coefficient(
    "lam",
    "a finite number ≥ 0",
    lambda value: value >= 0,
    "λ of uwo: weight of the variance",
    (("minimum", 0),),
)
RULE = Rule("uwo", _formula, (LAM,), spread=True)


def uwo(lam: float, *, weights: Mapping[str, float] | None = None) -> Aggregator:
    """Uncertainty-weighted optimisation: penalises the members' **variance** [1]_.

    Parameters
    ----------
    lam : float
        λ ≥ 0, per normalised unit. Coste et al. use 0.5 for best-of-n and 0.1 for PPO.
    weights : mapping of str to float, optional
        Weight of each member by its name, ≥ 0.

    Returns
    -------
    Aggregator
        mean − λ·Var with mean = Σ wᵢrᵢ and Var = Σ wᵢ(rᵢ − mean)², the weights wᵢ scaled to sum
        1; without weights wᵢ = 1/k, so Var has ddof 0.

    References
    ----------
    .. [1] Coste et al. 2023, arXiv 2310.02743.

    Examples
    --------
    >>> float(uwo(lam=0.5)([[1.0, 2.0, 4.0]])[0])
    1.5555555555555558
    """
    return make_aggregator("uwo", lam=lam, weights=weights)
