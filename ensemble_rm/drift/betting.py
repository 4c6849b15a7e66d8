"""Capital that grows by betting against a null hypothesis: an e-process in a few numbers.

A bettor starts with 1 and stakes the share λ of its capital on payoffs zᵢ ≥ −b, whose mean is at
most 0 under the null whatever came before: M = Π(1 + λzᵢ) with 0 ≤ λ < 1/b is a supermartingale
that starts at 1, so that P(it ever reaches 1/α) ≤ α [1]_ [2]_. Here the capital is dealt out to
several λ, and to bettors that enter later: the k-th time, every `SLOT` payoffs, 1/((k + 1)(k + 2))
of it enters [3]_. What has not entered is held as cash. The sum of capitals is a supermartingale,
too. Those who entered early lose while all is well, and would be poor when something changes;
whoever enters just before the change is not.

Knows payoffs; knows nothing of temperatures or judgments.

References
----------
.. [1] Waudby-Smith & Ramdas 2023, JRSS B: means of bounded variables by betting, arXiv 2010.09686.
.. [2] Ramdas et al. 2023, Statistical Science: game-theoretic statistics, arXiv 2210.01948.
.. [3] Shin, Ramdas & Rinaldo 2023: e-detectors, arXiv 2203.03532; here the entries' weights sum to
   1, for the bound is on any alarm ever and not on the time between alarms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.errors import OptionError

SLOT = 250  # payoffs between two entries of new bettors


@dataclass(frozen=True)
class Bets:
    """The bettors' capital after some payoffs.

    Attributes
    ----------
    stakes : tuple of float
        λ > 0 of the bettors.
    taken : int
        Payoffs so far.
    capital : tuple of float
        Log capital at each λ, of all who have entered; empty before the first payoff.
    """

    stakes: tuple[float, ...]
    taken: int = 0
    capital: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.stakes or not all(0 < stake < math.inf for stake in self.stakes):
            raise OptionError(f"stakes must be finite and > 0, not {self.stakes}")
        if len(self.capital) != (len(self.stakes) if self.taken else 0):
            raise OptionError(f"{len(self.capital)} capitals for {len(self.stakes)} stakes")

    @property
    def log_e(self) -> float:
        """Log of all capital, cash included; 0 before the first payoff."""
        if not self.taken:
            return 0.0
        return float(np.logaddexp(logsumexp(self.capital), math.log(_cash(self.taken - 1))))

    def take(self, payoffs: ArrayLike) -> tuple[Bets, Floats]:
        """Settle payoffs in their order.

        Parameters
        ----------
        payoffs : array_like, shape (n,)
            Each above −1/max(stakes).

        Returns
        -------
        Bets, ndarray
            The bettors afterwards, and the log of all capital after each payoff, shape (n,).

        Raises
        ------
        OptionError
            If a payoff would make a capital zero or negative.
        """
        z = np.asarray(payoffs, dtype=np.float64)
        if not (1 + max(self.stakes) * z > 0).all():
            raise OptionError(f"a payoff of {z.min():.4g} ruins a stake of {max(self.stakes)}")
        capital = np.array(self.capital or [-math.inf] * len(self.stakes))
        path, taken, done = np.empty(len(z)), self.taken, 0
        while done < len(z):
            if taken % SLOT == 0:
                capital = np.logaddexp(capital, math.log(_entry(taken) / len(self.stakes)))
            part = z[done : done + SLOT - taken % SLOT]
            grown = capital + np.cumsum(np.log1p(np.outer(part, self.stakes)), axis=0)
            total = logsumexp(grown, axis=1)
            path[done : done + len(part)] = np.logaddexp(total, math.log(_cash(taken)))
            capital, taken, done = grown[-1], taken + len(part), done + len(part)
        return Bets(self.stakes, taken, _told(capital) if taken else ()), path


def _entry(taken: int) -> float:
    """Return the share that enters after `taken` payoffs, a multiple of `SLOT`."""
    k = taken // SLOT
    return 1 / ((k + 1) * (k + 2))


def _cash(taken: int) -> float:
    """Return the share that has not entered once the payoff number `taken` is settled."""
    return 1 / (taken // SLOT + 2)


def _told(values: Floats | Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
