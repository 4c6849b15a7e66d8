"""The lower confidence bound: the mean less a multiple of the standard deviation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import Coefficient, Rule, SortedScores
from ensemble_rm.arrays import Floats


def _formula(scores: SortedScores, kappa: float) -> Floats:
    # κ = 0 is the mean, also of a single member, which has no standard deviation.
    return scores.mean() if kappa == 0 else scores.mean() - kappa * np.sqrt(scores.variance())


KAPPA = Coefficient(
    "kappa",
    "a finite number ≥ 0",
    lambda value: value >= 0,
    "κ of lcb: weight of the standard deviation",
    (("minimum", 0),),
)
RULE = Rule("lcb", _formula, (KAPPA,), spread=True)


def lcb(kappa: float, *, weights: Mapping[str, float] | None = None) -> Aggregator:
    """Lower confidence bound: penalises the members' **standard deviation** [1]_.

    Parameters
    ----------
    kappa : float
        κ ≥ 0, without unit. κ = 1 is Eisenstein et al.'s mean minus std [2]_.
    weights : mapping of str to float, optional
        Weight of each member by its name, ≥ 0.

    Returns
    -------
    Aggregator
        mean − κ·√Var with mean = Σ wᵢrᵢ and Var = Σ wᵢ(rᵢ − mean)², the weights wᵢ scaled to sum
        1; without weights wᵢ = 1/k, so Var has ddof 0.

    References
    ----------
    .. [1] Zhang et al. 2024, arXiv 2401.16635.
    .. [2] Eisenstein et al. 2023, arXiv 2312.09244.
    """
    return make_aggregator("lcb", kappa=kappa, weights=weights)
