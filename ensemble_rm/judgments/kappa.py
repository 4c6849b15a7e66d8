"""Agreement beyond chance, shares and their intervals, from sums over groups of prompts.

Which completion is called the first carries no meaning for agreement, so every pair counts in both
orientations: a preference of either completion is then equally likely by chance, and no figure
depends on the order. Knows nothing of judgments or the store.

References
----------
.. [1] Cohen 1960, Educational and Psychological Measurement 20: two annotators.
.. [2] Fleiss 1971, Psychological Bulletin 76: several; here with any number of annotators per item,
each item counting once, as Gwet 2014 (Handbook of Inter-Rater Reliability) has it.
.. [3] Kott 2001, Journal of Official Statistics 17: the delete-a-group jackknife.
.. [4] Wilson 1927, JASA 22; with an effective number of observations, Franco et al. 2019, Journal
   of Survey Statistics and Methodology 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import t as student

from ensemble_rm.arrays import Floats
from ensemble_rm.metrics import Interval

LEVEL = 0.95
ROUNDING = 1e-12


def chance_agreement(ties: float, other_ties: float) -> float:
    """Probability that two independent verdicts agree [1]_ [2]_, every pair in both orientations.

    Parameters
    ----------
    ties, other_ties : float
        Share of ties of either annotator; the rest is split equally between the completions.
    """
    return ties * other_ties + (1 - ties) * (1 - other_ties) / 2


def kappa(observed: float, ties: float, other_ties: float) -> float:
    """Agreement beyond chance, (observed − chance)/(1 − chance) [1]_.

    NaN where chance agreement is 1: both annotators vote only ties.
    """
    chance = chance_agreement(ties, other_ties)
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def item_agreement(counts: Floats) -> float:
    """Probability that two annotators of one item, drawn without replacement, agree [2]_.

    Parameters
    ----------
    counts : ndarray, shape (n_categories,)
        Annotators by verdict, two at least.
    """
    n = float(counts.sum())
    return float((counts * (counts - 1)).sum()) / (n * (n - 1))


def jackknife(sums: Floats, statistic: Callable[[Floats], float]) -> tuple[float, float, int]:
    """Estimate, standard error and number of groups, leaving out one group at a time [3]_.

    Parameters
    ----------
    sums : ndarray, shape (n_groups, ...)
        Sums over each group of prompts, of which the statistic is a function. A group of zeros is
        ignored.
    statistic : callable
        Function of the sums over all groups.

    Returns
    -------
    tuple
        Estimate, standard error, number of groups; the error is NaN with fewer than two groups.
    """
    total = sums.sum(axis=0)
    filled = np.flatnonzero(np.abs(sums).reshape(len(sums), -1).sum(axis=1))
    n = len(filled)
    if n < 2:
        return statistic(total), math.nan, n
    left = np.array([statistic(total - sums[group]) for group in filled])
    variance = (n - 1) / n * float(((left - left.mean()) ** 2).sum())
    return statistic(total), math.sqrt(variance), n


def figure(sums: Floats, statistic: Callable[[Floats], float]) -> Interval:
    """Return a figure in [−1, 1] with its Student interval; NaN bounds with one group."""
    estimate, error, n = jackknife(sums, statistic)
    # `not >=` also covers NaN.
    if not error >= 0 or math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan)
    reach = float(student.ppf((1 + LEVEL) / 2, n - 1)) * error
    return Interval(estimate, max(-1.0, estimate - reach), min(1.0, estimate + reach))


def share(sums: Floats) -> Interval:
    """Return a share with Wilson's interval at its effective number of observations [4]_.

    Parameters
    ----------
    sums : ndarray, shape (n_groups, 2)
        Hits and trials by group of prompts. Where all or none hit, the groups count as the
        observations.

    Returns
    -------
    Interval
        NaN without trials; NaN bounds with one group.
    """
    p, error, n = jackknife(sums, lambda sums: _ratio(sums[0], sums[1]))
    if math.isnan(p) or n < 2:
        return Interval(p, math.nan, math.nan)
    trials = float(sums[:, 1].sum())
    if not ROUNDING < p < 1 - ROUNDING:
        # The error is 0 there, and gives no effective number.
        effective = float(n)
    else:
        # At most the trials: dependent judgments must not narrow the interval.
        effective = trials if error == 0 else min(trials, p * (1 - p) / error**2)
    # Student instead of normal: the error is estimated from n groups.
    z = float(student.ppf((1 + LEVEL) / 2, n - 1))
    middle = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    reach = z / (1 + z * z / effective)
    reach *= math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    return Interval(p, max(0.0, middle - reach), min(1.0, middle + reach))


def _ratio(hits: float, trials: float) -> float:
    return float(hits / trials) if trials > 0 else math.nan
