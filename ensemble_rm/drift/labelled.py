"""Labelled drift: a sequential test of whether the incumbent's temperature still fits verdicts.

An e-process against a composite null: the true temperature T lies in an interval, the incumbent's
own or a wider one. Let a ≥ 0 be the size of a margin and v ∈ [0, 1] the verdict for the side with
the higher reward (a tie is ½, votes their share). Two bettors bet against the two ways out:

- *overconfident*, T above the interval: payoff z = u(σ(u) − v), u = a/high;
- *underconfident*, T below it: z = min(u, 4)(v − σ(u)), u = a/low.

σ(a/T) falls with T for a ≥ 0, so under every T in the interval the mean of both payoffs is at most
0: the edge is the least favourable point, and the interval needs no search. The e-value is the mean
of both capitals, and P(it ever reaches 1/α) ≤ α.

**Capital.** A bettor starts with 1 and stakes the share λ of its capital on payoffs zᵢ ≥ −b whose
mean is at most 0 under the null, whatever came before: M = Π(1 + λzᵢ) with 0 ≤ λ < 1/b is a
supermartingale that starts at 1, so that P(it ever reaches 1/α) ≤ α [1]_ [2]_. Here the capital is
divided among several λ and among bettors that enter later: at the k-th entry, every `SLOT` payoffs,
1/((k + 1)(k + 2)) of it enters [3]_; the rest is held as cash. The sum of capitals is a
supermartingale, too. Bettors that entered early lose while nothing has changed, and would have
little left at a change; one that enters just before the change has its full stake.

**Null.** Only means enter, so ties and votes do not break it. Either of two readings of the null
suffices: (1) the mean verdict, given the margin and all that came before, lies between σ(a/high)
and σ(a/low); (2) prompts are independent draws, and the temperature that solves their mean score
equation E[a(v − σ(a/T))] = 0, which is that of `fit_temperature` with equal weight per prompt, lies
in the interval, whatever the curve's true shape; for *underconfident* up to margins of 4T. Stakes
do not depend on the margin, otherwise (2) would not hold.

**Prompts.** Judgments of one prompt are dependent: a prompt pays once in a version's life, the mean
over its judgments in the batch where it first appears. Later ones are left out and counted, so that
judgments given twice do not matter either.

Knows margins and verdicts; knows nothing of texts, stores or versions.

References
----------
.. [1] Waudby-Smith & Ramdas 2023, JRSS B: means of bounded variables by betting, arXiv 2010.09686.
.. [2] Ramdas et al. 2023, Statistical Science: game-theoretic statistics, arXiv 2210.01948.
.. [3] Shin, Ramdas & Rinaldo 2023: e-detectors, arXiv 2203.03532; here the entries' weights sum to
   1, because the bound is on any alarm ever and not on the time between alarms.
.. [4] Horvitz & Thompson 1952: weights 1/π.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logsumexp
from scipy.stats import t as student

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.methods.temperature import TemperatureFit
from ensemble_rm.drift.options import TOLERANCE
from ensemble_rm.errors import NonFiniteScoreError, OptionError
from ensemble_rm.saved_json import from_row

SLOT = 250  # payoffs between two entries of new bettors
REACH = 4.0  # margin in units of T beyond which the verdict is near certain in any case
# Stakes must stay below 1 over the largest loss of a payoff, or one loss could ruin a bettor.
_OVER = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # < 1/max u·σ(−u) = 3.59
_UNDER = (0.03, 0.06, 0.12, 0.24)  # < 1/REACH


# Bets ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bets:
    """The bettors' capital after some payoffs.

    Attributes
    ----------
    stakes : tuple of float
        λ > 0 of the bettors.
    taken : int
        Number of payoffs so far.
    capital : tuple of float
        Log capital at each λ, of all bettors that have entered; empty before the first payoff.
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
        """Log of the total capital, cash included; 0 before the first payoff."""
        if not self.taken:
            return 0.0
        # taken − 1: an entry that is due now is made by the next `take`.
        return float(np.logaddexp(logsumexp(self.capital), math.log(_cash(self.taken - 1))))

    def take(self, payoffs: ArrayLike) -> tuple[Bets, Floats]:
        """Settle payoffs in order.

        Parameters
        ----------
        payoffs : array_like, shape (n,)
            Each above −1/max(stakes).

        Returns
        -------
        Bets, ndarray
            The bettors afterwards, and the log of the total capital after each payoff, shape (n,).

        Raises
        ------
        OptionError
            If a payoff would make a capital zero or negative.
        """
        z = np.asarray(payoffs, dtype=np.float64)
        if not (1 + max(self.stakes) * z > 0).all():
            raise OptionError(
                f"a payoff of {z.min():.4g} ruins a stake of {max(self.stakes)}; use smaller stakes"
            )
        # Log of 0: no bettor has entered yet.
        capital = np.array(self.capital or [-math.inf] * len(self.stakes))
        path, taken, done = np.empty(len(z)), self.taken, 0
        while done < len(z):
            if taken % SLOT == 0:
                capital = np.logaddexp(capital, math.log(_entry(taken) / len(self.stakes)))
            # Only up to the next entry: until then, capital grows by plain cumulative sums.
            part = z[done : done + SLOT - taken % SLOT]
            # (n_part, n_stakes); in logs, because products over a long life overflow.
            grown = capital + np.cumsum(np.log1p(np.outer(part, self.stakes)), axis=0)
            total = logsumexp(grown, axis=1)
            path[done : done + len(part)] = np.logaddexp(total, math.log(_cash(taken)))
            capital, taken, done = grown[-1], taken + len(part), done + len(part)
        return Bets(self.stakes, taken, tuple(capital.tolist()) if taken else ()), path


def _entry(taken: int) -> float:
    """Return the share of capital that enters after `taken` payoffs, a multiple of `SLOT`."""
    k = taken // SLOT
    return 1 / ((k + 1) * (k + 2))


def _cash(taken: int) -> float:
    """Return the share of capital still in cash once payoff number `taken` is settled."""
    # 1 minus all entries so far: the sum of 1/((k + 1)(k + 2)) telescopes.
    return 1 / (taken // SLOT + 2)


# Judgments ------------------------------------------------------------------------------------


def prompt_digest(prompt: str | int) -> str:
    """Return 16 hexadecimal digits that identify a prompt."""
    return hashlib.sha256(str(prompt).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class JudgedRows:
    """Judgments from the point of view of the side with the higher reward.

    Attributes
    ----------
    sizes : ndarray, shape (n_pairs,)
        Absolute margins, ≥ 0.
    verdicts : ndarray, shape (n_pairs,)
        Vote for that side, in [0, 1].
    keys : tuple of str
        Digest of each prompt.
    counts, inclusion : ndarray, shape (n_pairs,)
        Votes behind each verdict, and the pair's selection probability.
    """

    sizes: Floats
    verdicts: Floats
    keys: tuple[str, ...]
    counts: Floats
    inclusion: Floats

    @classmethod
    def read(
        cls,
        margins: ArrayLike,
        targets: ArrayLike,
        prompts: Sequence[str | int] | NDArray[np.int64],
        counts: ArrayLike | None,
        inclusion: ArrayLike | None,
    ) -> JudgedRows:
        """Validate judgments, and turn them to that side; see `DriftTest.update`."""
        x = np.asarray(margins, dtype=np.float64)
        y = np.asarray(targets, dtype=np.float64)
        c = np.ones(x.shape) if counts is None else np.asarray(counts, dtype=np.float64)
        pi = np.ones(x.shape) if inclusion is None else np.asarray(inclusion, dtype=np.float64)
        shapes = {x.shape, y.shape, c.shape, pi.shape, (len(prompts),)}
        if len(shapes) > 1:
            raise OptionError(f"margins, targets, prompts and weights differ in shape: {shapes}")
        if not np.isfinite(x).all():
            raise NonFiniteScoreError(
                "a margin is NaN or infinite; drop that pair, or score it again"
            )
        if not ((y >= 0) & (y <= 1)).all():
            raise OptionError("targets must lie in [0, 1]")
        if not ((c > 0) & np.isfinite(c)).all():
            raise OptionError("counts must be finite and > 0")
        if not ((pi > 0) & (pi <= 1)).all():
            raise OptionError("inclusion probabilities must lie in (0, 1]")
        keys = tuple(prompt_digest(p) for p in prompts)
        return cls(np.abs(x), np.where(x >= 0, y, 1 - y), keys, c, pi)

    def take(self, chosen: NDArray[np.bool_]) -> JudgedRows:
        """Return some of the rows."""
        keys = tuple(key for key, kept in zip(self.keys, chosen, strict=True) if kept)
        arrays = (self.sizes, self.verdicts, self.counts, self.inclusion)
        a, v, c, pi = (array[chosen] for array in arrays)
        return JudgedRows(a, v, keys, c, pi)

    def payoffs(self, edge: float, min_inclusion: float, *, over: bool) -> Floats:
        """Return one payoff per prompt, in the order of their first judgments."""
        u = self.sizes / edge
        p = np.asarray(expit(u))
        # Overconfident: a loss is at most u·σ(−u), which is bounded. Underconfident: it grows with
        # u, hence the cap.
        z = u * (p - self.verdicts) if over else np.minimum(u, REACH) * (self.verdicts - p)
        number: dict[str, int] = {}
        prompt = np.array([number.setdefault(key, len(number)) for key in self.keys])
        # Horvitz–Thompson weights [4]_, scaled to at most 1: a larger one could ruin a bettor.
        paid = np.bincount(prompt, self.counts * z * (min_inclusion / self.inclusion))
        return np.asarray(paid / np.bincount(prompt, self.counts), dtype=np.float64)


# Test -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DriftPoint:
    """The test after one batch.

    Attributes
    ----------
    at : str
        Date or name of the batch.
    prompts : int
        Prompts that have paid so far.
    log_e, log_over, log_under : float
        Log e-value, and its two halves: against overconfidence and underconfidence.
    again, selected : int
        Judgments of the batch that were left out: of prompts that had paid in earlier batches, and
        of pairs selected with π < min_inclusion.
    """

    at: str
    prompts: int
    log_e: float
    log_over: float
    log_under: float
    again: int = 0
    selected: int = 0


@dataclass(frozen=True)
class LabelledDrift:
    """The result of a `DriftTest`, without the state that it continues from.

    Attributes
    ----------
    low, high : float
        The null hypothesis: T lies between them.
    alpha, promise : float
        See `DriftTest`.
    prompts : int
        Prompts that have paid.
    log_e, peak : float
        Log e-value now, and at its largest.
    alarmed_at : str, optional
        The batch in which the alarm was raised.
    alarmed_after : int
        Prompts that had paid then.
    direction : str
        ``"overconfident"``, ``"underconfident"``, or empty.
    history : tuple of DriftPoint
        One point per batch.
    """

    low: float
    high: float
    alpha: float
    promise: float
    prompts: int
    log_e: float
    peak: float
    alarmed_at: str | None
    alarmed_after: int
    direction: str
    history: tuple[DriftPoint, ...]

    @property
    def alarm(self) -> bool:
        """Whether the e-value ever reached 1/alpha."""
        return self.alarmed_at is not None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: Any) -> LabelledDrift:
        """Read what `to_json` wrote, else `SchemaError`."""
        return from_row(cls, d)


@dataclass(frozen=True)
class DriftTest:
    """A sequential test over one calibration's life, from its publication on. Immutable.

    Attributes
    ----------
    low, high : float
        The null hypothesis: T lies between them.
    alpha : float
        Bound on P(any alarm in a life in which the null hypothesis is true).
    promise : float
        Bound on P(any alarm over a life without drift): `alpha` plus the chance that the
        incumbent's interval missed the true T when it was fitted.
    min_inclusion : float
        Judgments of pairs that were selected with a smaller probability π are left out, the others
        weighted by min_inclusion/π, which is at most 1 as the bets' bound requires. Default 1: only
        pairs drawn at random.
    over, under : Bets
        The two bettors.
    peak : float
        Largest log e-value so far.
    alarmed_at : str, optional
        The batch in which the alarm was raised; an alarm is never withdrawn.
    alarmed_after : int
        Prompts that had paid by then; 0 without an alarm.
    direction : str
        ``"overconfident"`` (T has risen) or ``"underconfident"``, at the alarm if there is one,
        else now; empty before the first prompt.
    seen : frozenset of str
        Digests of the prompts that have paid.
    history : tuple of DriftPoint
        One point per batch with new prompts.
    """

    low: float
    high: float
    alpha: float
    promise: float
    min_inclusion: float = 1.0
    over: Bets = field(default_factory=lambda: Bets(_OVER))
    under: Bets = field(default_factory=lambda: Bets(_UNDER))
    peak: float = 0.0
    alarmed_at: str | None = None
    alarmed_after: int = 0
    direction: str = ""
    seen: frozenset[str] = field(default_factory=frozenset, repr=False)
    history: tuple[DriftPoint, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high < math.inf:
            raise OptionError(f"the null interval of T is empty: {self.low} to {self.high}")
        if not 0 < self.alpha <= self.promise < 1:
            raise OptionError(
                f"0 < alpha ≤ promise < 1 is required, not alpha={self.alpha} and "
                f"promise={self.promise}"
            )
        if not 0 < self.min_inclusion <= 1:
            raise OptionError(f"min_inclusion must be in (0, 1], not {self.min_inclusion}")

    @classmethod
    def start(
        cls,
        fit: TemperatureFit,
        *,
        promise: float = 0.05,
        tolerance: float = TOLERANCE,
        min_inclusion: float = 1.0,
        known: Sequence[str | int] = (),
    ) -> DriftTest:
        """Start the test of a published temperature.

        It takes judgments that the fit has not seen. Half of `promise` covers the chance that the
        interval of `fit` misses the true T, the other half the test itself. The null is that
        interval, or T·(1 + tolerance)^±1 where that is wider.

        Parameters
        ----------
        fit : TemperatureFit
            Of the incumbent.
        promise : float
            Bound on P(any alarm over a life without drift).
        tolerance : float
            Relative change of T that does not count as drift.
        min_inclusion : float
            See the class.
        known : sequence of (str or int)
            Prompts that the temperature was fitted on; later judgments of them are left out.

        Returns
        -------
        DriftTest
        """
        if not tolerance >= 0:
            raise OptionError(f"tolerance must be ≥ 0, not {tolerance}")
        if not 0 < promise < 1:
            raise OptionError(f"promise must be in (0, 1), not {promise}")
        # Two-sided at promise/2; the other half is the level of the test.
        quantile = float(student.ppf(1 - promise / 4, max(fit.prompts - 1, 1)))
        reach = max(quantile * fit.log_se, math.log1p(tolerance))
        # exp overflows above 709.
        low = min(fit.low, fit.temperature * math.exp(-min(reach, 700.0)))
        high = max(fit.high, fit.temperature * math.exp(min(reach, 700.0)))
        seen = frozenset(map(prompt_digest, known))
        return cls(low, high, promise / 2, promise, min_inclusion, seen=seen)

    @property
    def log_e(self) -> float:
        """Log of the current e-value."""
        # The mean of two e-values is an e-value, whatever their dependence.
        return float(np.logaddexp(self.over.log_e, self.under.log_e)) - math.log(2)

    @property
    def prompts(self) -> int:
        """Number of prompts that have paid."""
        # Both bettors take every payoff, so either count is the number of prompts.
        return self.over.taken

    @property
    def alarm(self) -> bool:
        """Whether the e-value ever reached 1/alpha."""
        return self.alarmed_at is not None

    def update(
        self,
        margins: ArrayLike,
        targets: ArrayLike,
        *,
        prompts: Sequence[str | int] | NDArray[np.int64],
        at: str,
        counts: ArrayLike | None = None,
        inclusion: ArrayLike | None = None,
    ) -> DriftTest:
        """Return the test after a batch of judgments in order of time.

        Parameters
        ----------
        margins : array_like, shape (n_pairs,)
            Of the incumbent's reward, first minus second.
        targets : array_like, shape (n_pairs,)
            P(first is preferred) by the judgments: 1, 0, ½ for a tie, or a share of votes.
        prompts : sequence of (str or int), shape (n_pairs,)
            Names of the prompts, the same in every batch.
        at : str
            Date or name of the batch.
        counts : array_like, shape (n_pairs,), optional
            Votes behind each target, > 0; 1 by default. The number of votes must not depend on
            their outcome.
        inclusion : array_like, shape (n_pairs,), optional
            Probability π with which each pair was selected; 1 for random draws.

        Returns
        -------
        DriftTest
            The same object if the batch has no new prompt.

        Raises
        ------
        OptionError
            If lengths differ, or values are outside their range.
        NonFiniteScoreError
            If a margin is not finite.
        """
        rows = JudgedRows.read(margins, targets, prompts, counts, inclusion)
        fresh = np.array([key not in self.seen for key in rows.keys], dtype=bool)
        likely = rows.inclusion >= self.min_inclusion
        taken = rows.take(fresh & likely)
        if not taken.keys:
            return self
        over, path_over = self.over.take(taken.payoffs(self.high, self.min_inclusion, over=True))
        under, path_under = self.under.take(taken.payoffs(self.low, self.min_inclusion, over=False))
        path = np.logaddexp(path_over, path_under) - math.log(2)
        new = replace(
            self,
            over=over,
            under=under,
            # Over the path: the bound allows an alarm after any payoff, not only after a batch.
            peak=max(self.peak, float(path.max())),
            seen=self.seen.union(taken.keys),
        )
        point = DriftPoint(
            at,
            over.taken,
            new.log_e,
            over.log_e,
            under.log_e,
            int((~fresh).sum()),
            int((fresh & ~likely).sum()),
        )
        return replace(
            new, history=(*self.history, point), **self._judge(path, path_over, path_under, at)
        )

    def _judge(self, path: Floats, over: Floats, under: Floats, at: str) -> dict[str, Any]:
        if self.alarm:
            return {}
        crossed = np.flatnonzero(path >= -math.log(self.alpha))
        row = int(crossed[0]) if len(crossed) else len(path) - 1
        changes = {"direction": "overconfident" if over[row] >= under[row] else "underconfident"}
        if not len(crossed):
            return changes
        return changes | {"alarmed_at": at, "alarmed_after": self.over.taken + row + 1}

    def result(self) -> LabelledDrift:
        """Return the result, for a report."""
        return LabelledDrift(**{f.name: getattr(self, f.name) for f in fields(LabelledDrift)})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self) | {"seen": sorted(self.seen)}

    @classmethod
    def from_json(cls, d: Any) -> DriftTest:
        """Read what `to_json` wrote, else `SchemaError`."""
        return from_row(cls, d)
