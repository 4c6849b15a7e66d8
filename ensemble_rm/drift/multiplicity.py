"""Corrections for many tests: Holm's, and the number of permutations that it needs.

References
----------
.. [1] Holm 1979, Scandinavian J. Statistics 6: a simple sequentially rejective procedure.
.. [2] Phipson & Smyth 2010: permutation p-values are never 0, (1 + b)/(1 + B).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import OptionError


def holm(p: ArrayLike) -> Floats:
    """Return adjusted p-values [1]_, shape (n,): P(any below α) ≤ α under every dependence."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    # The running maximum keeps adjusted p-values in the order of the raw ones.
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(raised, 1.0)
    return adjusted


def level_of(alpha: float, checks: int) -> float:
    """Return the level of one check, so that P(any alarm in all checks) ≤ alpha."""
    if not 0 < alpha < 1 or checks < 1:
        raise OptionError(f"alpha must be in (0, 1) and checks ≥ 1, not {alpha} and {checks}")
    return alpha / checks


def permutations_for(level: float, tests: int) -> int:
    """Return how many permutations resolve `level` after Holm's correction."""
    # The smallest p-value is 1/(1 + B); Holm multiplies it by `tests` at most. With the factor 4
    # the product is below a quarter of the level.
    return max(999, math.ceil(4 * max(tests, 1) / level))


def permutation_p(seen: float, redrawn: Floats) -> float:
    """Return the p-value of a statistic that is large under change [2]_; ties count as larger."""
    # The tolerance: equal statistics differ by rounding, as sums are taken in another order.
    return float((1 + (redrawn >= seen - 1e-12).sum()) / (1 + len(redrawn)))
