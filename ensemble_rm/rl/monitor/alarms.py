"""What is kept of each step of a run, and the rule by which it is held to be going wrong.

Knows numbers; knows nothing of trainers or models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.best_of_n.curves import CurveFit, fit_curve
from ensemble_rm.errors import DataError, OptionError

AlarmKind: TypeAlias = Literal["gold", "disagreement", "length", "kl"]


@dataclass(frozen=True)
class StepRecord:
    """One step of a run.

    Attributes
    ----------
    step : int
    reward : float
        Mean, in normalised units.
    length_controlled : float
        The same less what length alone explains since the run's beginning.
    member_std, disagreement : float
        Mean spread of the members, and mean share of outvoted ones; NaN for one member.
    log_length : float
        Mean natural logarithm of the completions' characters.
    length_slopes : dict of str to float
        Within-prompt slope of each aggregator's reward on log length.
    outside_range : float
        Share of scores outside their member's reference range; NaN where there is none.
    failed : float
        Share of samples without a reward.
    kl : float
        From the policy that the run began with, nats a completion; NaN where it was not measured.
    gold : float
        Of a gold check at this step; NaN where there was none.
    missing : float
        Share of the members' scores that the rewarded samples lack, such as those of a server that
        is out; spread and disagreement are of the samples that have them.
    """

    step: int
    reward: float
    length_controlled: float
    member_std: float
    disagreement: float
    log_length: float
    length_slopes: Mapping[str, float] = field(default_factory=dict)
    outside_range: float = math.nan
    failed: float = 0.0
    kl: float = math.nan
    gold: float = math.nan
    missing: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object; what is not known is null."""
        record: dict[str, Any] = finite_or_none(asdict(self))
        return record

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> StepRecord:
        """Read what `to_json` has written.

        Parameters
        ----------
        said : mapping

        Raises
        ------
        DataError
            If it is no such object.
        """

        def number(value: Any) -> float:
            return math.nan if value is None else float(value)

        try:
            given = {"missing": 0.0} | dict(said)  # runs of before it was recorded
            values = {name: number(given[name]) for name in _NUMBERS}
            slopes = {str(name): number(slope) for name, slope in said["length_slopes"].items()}
            return cls(step=int(said["step"]), length_slopes=slopes, **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{said!r:.200} is no step of a run: {error!r}") from error


_NUMBERS = [f.name for f in fields(StepRecord) if f.name not in ("step", "length_slopes")]


@dataclass(frozen=True)
class Alarm:
    """Why a run is held to be going wrong.

    Attributes
    ----------
    kind : {"gold", "disagreement", "length", "kl"}
    step : int
    message : str
        What was seen, and against what.
    """

    kind: AlarmKind
    step: int
    message: str


@dataclass(frozen=True)
class AlarmRule:
    """When a run is held to be going wrong; each part alone suffices.

    Attributes
    ----------
    peak_share : float
        In (0, 1]. *gold*: √KL has reached this share of the peak of Gao's curve
        R(d) = d(α − β log d), fitted to the gold checks; below 1, it is reached before the peak is.
    min_gold : int
        ≥ 3, the fewest checks at different KL that are fitted, beside the first one.
    std_factor : float
        > 1. *disagreement*: the mean member std of the last `window` steps exceeds the reference's
        by this factor: the judgments' of the calibration, or that of the first `window` steps.
    length_factor : float
        > 1. *length*: completions have grown by this factor over the first `window` steps' (as
        geometric means), and the reward still rises with length within prompts.
    max_kl : float, optional
        *kl*: the last measured KL exceeds it, nats a completion; no bound by default.
    window : int
        Steps that are averaged, ≥ 1.
    """

    peak_share: float = 0.9
    min_gold: int = 4
    std_factor: float = 1.5
    length_factor: float = 2.0
    max_kl: float | None = None
    window: int = 5

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("peak_share", 0 < self.peak_share <= 1, "in (0, 1]"),
            ("min_gold", self.min_gold >= 3, "at least 3"),
            ("std_factor", self.std_factor > 1, "> 1"),
            ("length_factor", self.length_factor > 1, "> 1"),
            ("max_kl", self.max_kl is None or self.max_kl > 0, "> 0"),
            ("window", self.window >= 1, "at least 1"),
        ):
            if not holds:
                raise OptionError(f"{name} must be {wanted}, not {getattr(self, name)!r}")

    def alarms(
        self, records: Sequence[StepRecord], *, aggregator: str, reference_std: float | None
    ) -> list[Alarm]:
        """Return what is wrong at the last step.

        Parameters
        ----------
        records : sequence of StepRecord
            Every step so far, in order.
        aggregator : str
            Whose length slope counts: the run's own.
        reference_std : float, optional
            Mean member std of the calibration's judgments.
        """
        if not records:
            return []
        found = [
            self._gold(records),
            self._disagreement(records, reference_std),
            self._length(records, aggregator),
            self._kl(records),
        ]
        return [alarm for alarm in found if alarm is not None]

    def _gold(self, records: Sequence[StepRecord]) -> Alarm | None:
        fit, kl = gold_curve(records, min_gold=self.min_gold), last_kl(records)
        if fit is None or math.isnan(kl) or not math.isfinite(fit.peak):
            return None
        d = math.sqrt(max(kl, 0.0))
        if d < self.peak_share * fit.peak:
            return None
        low, high = fit.peak_interval
        return Alarm(
            "gold",
            records[-1].step,
            f"√KL is {d:.2f}, {self.peak_share:g} of the peak of gold at {fit.peak:.2f} "
            f"(95 % {low:.2f} to {high:.2f}) or more",
        )

    def _disagreement(
        self, records: Sequence[StepRecord], reference_std: float | None
    ) -> Alarm | None:
        stds = [record.member_std for record in records]
        where = "the calibration's judgments"
        if reference_std is None:
            if len(stds) <= self.window:
                return None
            reference_std, where = mean_of(stds[: self.window]), "the run's beginning"
        now = mean_of(stds[-self.window :])
        if len(stds) < self.window or not now > self.std_factor * reference_std:
            return None
        return Alarm(
            "disagreement",
            records[-1].step,
            f"the members' std is {now:.2f} over {self.window} steps, more than "
            f"{self.std_factor:g} times the {reference_std:.2f} of {where}",
        )

    def _length(self, records: Sequence[StepRecord], aggregator: str) -> Alarm | None:
        if len(records) <= self.window:
            return None
        lengths = [record.log_length for record in records]
        grown = math.exp(mean_of(lengths[-self.window :]) - mean_of(lengths[: self.window]))
        last = records[-self.window :]
        slope = mean_of([r.length_slopes.get(aggregator, math.nan) for r in last])
        if not (grown > self.length_factor and slope > 0):
            return None
        return Alarm(
            "length",
            records[-1].step,
            f"completions have grown {grown:.1f}-fold, and the reward rises by {slope:.2f} a unit "
            "of log length within prompts",
        )

    def _kl(self, records: Sequence[StepRecord]) -> Alarm | None:
        kl = last_kl(records)
        if self.max_kl is None or not kl > self.max_kl:
            return None
        return Alarm("kl", records[-1].step, f"the KL is {kl:.1f} nats, beyond {self.max_kl:g}")


def mean_of(values: Sequence[float]) -> float:
    """Average what is known; NaN where nothing is."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def last_kl(records: Sequence[StepRecord]) -> float:
    """Return the KL measured last; NaN where none was."""
    return next((r.kl for r in reversed(records) if math.isfinite(r.kl)), math.nan)


def gold_curve(records: Sequence[StepRecord], *, min_gold: int) -> CurveFit | None:
    """Fit Gao's curve of reinforcement learning to a run's gold checks; None for too few.

    Parameters
    ----------
    records : sequence of StepRecord
        Of those with gold, the first is where the curve begins: check gold before the run moves.
    min_gold : int
        The fewest checks at different KL > 0, beside the first.

    Returns
    -------
    CurveFit or None
    """
    checks = [r for r in records if math.isfinite(r.gold) and math.isfinite(r.kl)]
    d = np.array([math.sqrt(max(r.kl, 0.0)) for r in checks[1:]])
    if len(np.unique(d[d > 0])) < max(min_gold, 3):
        return None
    gold = np.array([r.gold - checks[0].gold for r in checks[1:]])
    return fit_curve(d, gold, form="rl")
