"""Labelled drift: a sequential test of whether the incumbent's temperature still fits verdicts.

An e-process against a composite null: the true temperature T lies in an interval, the incumbent's
own or wider. Let a ≥ 0 be the size of a margin and v ∈ [0, 1] the verdict for the side of the
higher reward (a tie is ½, votes their share). Two gamblers bet against the two ways out:

- *overconfident*, T above the interval: z = u(σ(u) − v), u = a/high;
- *underconfident*, T below it: z = min(u, 4)(v − σ(u)), u = a/low.

σ(a/T) falls with T for a ≥ 0, so under every T in the interval the mean of both payoffs is at most
0: the edge is the least favourable point, and no search over the interval is needed. The e-value is
the mean of both capitals (`bets`), and P(it ever reaches 1/α) ≤ α.

Only means enter, so neither ties nor votes break it. Two readings of the null suffice, each alone:
(1) the mean verdict given the margin and all that came before lies between σ(a/high) and σ(a/low);
(2) prompts are independent draws, and the temperature that solves their mean score equation
E[a(v − σ(a/T))] = 0, which is `fit_temperature`'s with prompts weighing the same, lies in the
interval, whatever the curve's true shape; for *underconfident* up to margins beyond 4T. Stakes
depend on no margin, for else (2) would not hold.

Judgments of one prompt depend on one another: a prompt pays once in a life, the mean over its
judgments in the batch where it first appears; later ones are left out and counted. That makes the
test indifferent to judgments given twice, too.

Knows margins and verdicts; knows nothing of texts, stores or versions.

References
----------
.. [1] Waudby-Smith & Ramdas 2023, JRSS B, arXiv 2010.09686: bets on bounded means.
.. [2] Ramdas et al. 2023, Statistical Science, arXiv 2210.01948: composite nulls, e-processes.
.. [3] Horvitz & Thompson 1952: weights 1/π.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.methods.temperature import TemperatureFit
from ensemble_rm.drift.betting import Bets
from ensemble_rm.drift.payoffs import JudgedRows, prompt_digest
from ensemble_rm.errors import OptionError

TOLERANCE = 0.1
_OVER = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # < 1/max u·σ(−u) = 3.59
_UNDER = (0.03, 0.06, 0.12, 0.24)  # < 1/REACH


@dataclass(frozen=True)
class DriftPoint:
    """The test after one batch.

    Attributes
    ----------
    at : str
        The batch's date or name.
    prompts : int
        That have paid so far.
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
    """What a `DriftTest` says, without the state that it goes on from.

    Attributes
    ----------
    low, high : float
        The null: T lies between them.
    alpha, promise : float
        See `DriftTest`.
    prompts : int
        That have paid.
    log_e, peak : float
        Log e-value now, and at its largest.
    alarmed_at : str, optional
        The batch in which the alarm was raised.
    alarmed_after : int
        Prompts that had paid then.
    direction : str
        ``"overconfident"``, ``"underconfident"``, or empty.
    history : tuple of DriftPoint
        One a batch.
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
        """Read what `to_json` wrote."""
        return cls(**{**d, "history": tuple(DriftPoint(**point) for point in d["history"])})


@dataclass(frozen=True)
class DriftTest:
    """A sequential test of one calibration's life, from its publication on. Immutable.

    Attributes
    ----------
    low, high : float
        The null: T lies between them.
    alpha : float
        P(any alarm in a life in which the null holds) is at most this.
    promise : float
        P(any alarm over a healthy life) is at most this: `alpha`, and the chance that the
        incumbent's interval missed the truth when it was fitted.
    min_inclusion : float
        Judgments of pairs that were selected with a smaller probability π are left out, others
        weighted with min_inclusion/π, which is at most 1 as the bets' bound needs. 1, the
        default, takes random draws alone.
    over, under : Bets
        The two gamblers.
    peak : float
        Largest log e-value so far.
    alarmed_at : str, optional
        The batch in which the alarm was raised; it stays raised.
    alarmed_after : int
        Prompts that had paid then; 0 without alarm.
    direction : str
        ``"overconfident"`` (T has risen) or ``"underconfident"``, as it was at the alarm, or is
        now; empty before the first prompt.
    seen : frozenset of str
        Digests of the prompts that have paid.
    history : tuple of DriftPoint
        One a batch that brought something new.
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
            raise OptionError(f"0 < alpha ≤ promise < 1 fails: {self.alpha}, {self.promise}")
        if not 0 < self.min_inclusion <= 1:
            raise OptionError(f"min_inclusion must lie in (0, 1], not {self.min_inclusion}")

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
        """Begin the life of a published temperature.

        The life takes judgments that the fit has not seen. Half of `promise` covers the chance
        that the interval of `fit` misses the truth, half the test's own. The null is that
        interval, or T·(1 + tolerance)^±1 where that is wider.

        Parameters
        ----------
        fit : TemperatureFit
            Of the incumbent.
        promise : float
            P(any alarm over a healthy life) is at most this.
        tolerance : float
            Relative change of T that is of no interest.
        min_inclusion : float
            See the class.
        known : sequence of (str or int)
            Prompts that the temperature was fitted on; their later judgments are left out.

        Returns
        -------
        DriftTest
        """
        if not tolerance >= 0:
            raise OptionError(f"tolerance must be ≥ 0, not {tolerance}")
        if not 0 < promise < 1:
            raise OptionError(f"promise must lie in (0, 1), not {promise}")
        quantile = float(student.ppf(1 - promise / 4, max(fit.prompts - 1, 1)))
        reach = max(quantile * fit.log_se, math.log1p(tolerance))
        low = min(fit.low, fit.temperature * math.exp(-min(reach, 700.0)))
        high = max(fit.high, fit.temperature * math.exp(min(reach, 700.0)))
        seen = frozenset(map(prompt_digest, known))
        return cls(low, high, promise / 2, promise, min_inclusion, seen=seen)

    @property
    def log_e(self) -> float:
        """Log of the e-value now."""
        return float(np.logaddexp(self.over.log_e, self.under.log_e)) - math.log(2)

    @property
    def prompts(self) -> int:
        """How many prompts have paid."""
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
        """Take a batch of judgments in the order of their time.

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
            Votes behind each target, > 0; each counts once where not given. How many were asked for
            must not depend on what they said.
        inclusion : array_like, shape (n_pairs,), optional
            Probability π with which each pair was selected; 1 for random draws.

        Returns
        -------
        DriftTest
            The same where the batch brings nothing new.

        Raises
        ------
        OptionError
            If lengths differ or values lie outside of their range.
        NonFiniteScoreError
            If a margin is not finite.
        """
        rows = JudgedRows.read(margins, targets, prompts, counts, inclusion)
        fresh = np.array([key not in self.seen for key in rows.keys], dtype=bool)
        wanted = rows.inclusion >= self.min_inclusion
        taken = rows.take(fresh & wanted)
        if not taken.keys:
            return self
        over, path_over = self.over.take(taken.payoffs(self.high, self.min_inclusion, over=True))
        under, path_under = self.under.take(taken.payoffs(self.low, self.min_inclusion, over=False))
        path = np.logaddexp(path_over, path_under) - math.log(2)
        new = replace(
            self,
            over=over,
            under=under,
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
            int((fresh & ~wanted).sum()),
        )
        return replace(
            new, history=(*self.history, point), **self._judge(path, path_over, path_under, at)
        )

    def _judge(self, path: Floats, over: Floats, under: Floats, at: str) -> dict[str, Any]:
        if self.alarm:
            return {}
        crossed = np.flatnonzero(path >= -math.log(self.alpha))
        place = int(crossed[0]) if len(crossed) else len(path) - 1
        said = {"direction": "overconfident" if over[place] >= under[place] else "underconfident"}
        if not len(crossed):
            return said
        return said | {"alarmed_at": at, "alarmed_after": self.over.taken + place + 1}

    def result(self) -> LabelledDrift:
        """Return what it says, for a report."""
        return LabelledDrift(**{f.name: getattr(self, f.name) for f in fields(LabelledDrift)})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self) | {"seen": sorted(self.seen)}

    @classmethod
    def from_json(cls, d: Any) -> DriftTest:
        """Read what `to_json` wrote."""
        said = dict(d)
        for name in ("over", "under"):
            bets = said[name]
            said[name] = Bets(tuple(bets["stakes"]), bets["taken"], tuple(bets["capital"]))
        said["seen"] = frozenset(said["seen"])
        said["history"] = tuple(DriftPoint(**point) for point in said["history"])
        return cls(**said)
