"""The record of each step of a run, and the rule that raises alarms from the records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.best_of_n.curves import CurveFit, fit_curve
from ensemble_rm.errors import DataError, OptionError, SchemaError
from ensemble_rm.saved_json import as_object, get

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
        Mean reward minus what growth in length since the start of the run explains.
    member_std, disagreement : float
        Mean std over members, and mean share of outvoted members; NaN for one member.
    log_length : float
        Mean natural logarithm of the completions' characters.
    length_slopes : dict of str to float
        Within-prompt slope of each aggregator's reward on log length.
    outside_range : float
        Share of scores outside their member's reference range; NaN if there is none.
    failed : float
        Share of samples without a reward.
    kl : float
        KL from the policy that the run started with, nats per completion; NaN if not measured.
    gold : float
        Mean gold reward of a check at this step; NaN if there was none.
    missing : float
        Share of members' scores that rewarded samples do not have, such as those of an unreachable
        server; disagreement is measured on the samples that all members scored.
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
        """Return a JSON object, with null for NaN."""
        record: dict[str, Any] = finite_or_none(asdict(self))
        return record

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> StepRecord:
        """Return the record of a `to_json` object.

        Parameters
        ----------
        d : mapping

        Raises
        ------
        DataError
            If it has other fields or values.
        """

        def numbers(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
            read = {name: get(values, name, float | None) for name in names}
            return {name: math.nan if x is None else x for name, x in read.items()}

        # Null in JSON is NaN here.
        try:
            row = {"missing": 0.0} | as_object(d)  # older records do not have it
            slopes = get(row, "length_slopes", Mapping[str, Any])
            return cls(
                step=get(row, "step", int),
                length_slopes=numbers(slopes, slopes),
                **numbers(row, _NUMBERS),
            )
        except SchemaError as error:
            raise DataError(f"not a step of a run: {error}") from error


_NUMBERS = [f.name for f in fields(StepRecord) if f.name not in ("step", "length_slopes")]


@dataclass(frozen=True)
class Alarm:
    """A sign of over-optimisation.

    Attributes
    ----------
    kind : {"gold", "disagreement", "length", "kl"}
    step : int
    message : str
        The measured value and its threshold.
    """

    kind: AlarmKind
    step: int
    message: str


@dataclass(frozen=True)
class AlarmRule:
    """When to raise an alarm; each part is an alarm of its own.

    Attributes
    ----------
    peak_share : float
        In (0, 1]. *gold*: √KL has reached this share of the peak of Gao's curve
        R(d) = d(α − β log d), fitted to the gold checks. Below 1, the alarm comes before the peak.
    min_gold : int
        ≥ 3, minimum number of checks at different KL, not counting the first.
    std_factor : float
        > 1. *disagreement*: the mean std over members in the last `window` steps exceeds that of
        the calibration's judgments, or else that of the first `window` steps, by this factor.
    length_factor : float
        > 1. *length*: the geometric mean of the completions' lengths has grown by this factor since
        the first `window` steps, and the reward still rises with length within prompts.
    max_kl : float, optional
        *kl*: the last measured KL exceeds it, nats per completion (default: no maximum).
    window : int
        Number of steps to average, ≥ 1.
    """

    peak_share: float = 0.9
    min_gold: int = 4
    std_factor: float = 1.5
    length_factor: float = 2.0
    max_kl: float | None = None
    window: int = 5

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("peak_share", 0 < self.peak_share <= 1, "in (0, 1]"),
            ("min_gold", self.min_gold >= 3, "at least 3"),
            ("std_factor", self.std_factor > 1, "> 1"),
            ("length_factor", self.length_factor > 1, "> 1"),
            ("max_kl", self.max_kl is None or self.max_kl > 0, "> 0"),
            ("window", self.window >= 1, "at least 1"),
        ):
            if not valid:
                raise OptionError(f"{name} must be {expected}, not {getattr(self, name)!r}")

    def alarms(
        self, records: Sequence[StepRecord], *, aggregator: str, reference_std: float | None
    ) -> list[Alarm]:
        """Return the alarms at the last step.

        Parameters
        ----------
        records : sequence of StepRecord
            Every step so far, in order.
        aggregator : str
            Name of the run's own, whose length slope counts.
        reference_std : float, optional
            Mean std over members on the calibration's judgments.
        """
        if not records:
            return []
        alarms = [
            self._gold(records),
            self._disagreement(records, reference_std),
            self._length(records, aggregator),
            self._kl(records),
        ]
        return [alarm for alarm in alarms if alarm is not None]

    def _gold(self, records: Sequence[StepRecord]) -> Alarm | None:
        # Gao's curve is fitted in √KL, so a peak has meaning only where the KL was measured.
        fit, kl = gold_curve(records, min_gold=self.min_gold), last_kl(records)
        if fit is None or math.isnan(kl) or not math.isfinite(fit.peak):
            return None
        # Estimates of a small KL may be below 0.
        d = math.sqrt(max(kl, 0.0))
        if d < self.peak_share * fit.peak:
            return None
        low, high = fit.peak_interval
        return Alarm(
            "gold",
            records[-1].step,
            f"√KL is {d:.2f}, at least {self.peak_share:g} of the peak of gold at {fit.peak:.2f} "
            f"(95 % interval {low:.2f} to {high:.2f})",
        )

    def _disagreement(
        self, records: Sequence[StepRecord], reference_std: float | None
    ) -> Alarm | None:
        stds = [record.member_std for record in records]
        where = "the calibration's judgments"
        # Without a calibration the run's first steps are the reference.
        if reference_std is None:
            if len(stds) <= self.window:
                return None
            reference_std, where = mean_of(stds[: self.window]), "the first steps"
        # The mean of a window: single batches vary by their prompts.
        now = mean_of(stds[-self.window :])
        if len(stds) < self.window or not now > self.std_factor * reference_std:
            return None
        return Alarm(
            "disagreement",
            records[-1].step,
            f"std over members is {now:.2f} in the last {self.window} steps, more than "
            f"{self.std_factor:g} times the {reference_std:.2f} of {where}",
        )

    def _length(self, records: Sequence[StepRecord], aggregator: str) -> Alarm | None:
        if len(records) <= self.window:
            return None
        # Log lengths: exp of a difference is a ratio of geometric means.
        lengths = [record.log_length for record in records]
        grown = math.exp(mean_of(lengths[-self.window :]) - mean_of(lengths[: self.window]))
        last = records[-self.window :]
        slope = mean_of([r.length_slopes.get(aggregator, math.nan) for r in last])
        # Long completions alone are no alarm; they must also be rewarded within prompts.
        if not (grown > self.length_factor and slope > 0):
            return None
        return Alarm(
            "length",
            records[-1].step,
            f"completions have grown {grown:.1f}-fold, and the reward rises by {slope:.2f} per "
            "unit of log length within prompts",
        )

    def _kl(self, records: Sequence[StepRecord]) -> Alarm | None:
        kl = last_kl(records)
        if self.max_kl is None or not kl > self.max_kl:
            return None
        return Alarm("kl", records[-1].step, f"KL is {kl:.1f} nats, above {self.max_kl:g}")


def mean_of(values: Sequence[float]) -> float:
    """Return the mean of the finite values; NaN if there are none."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def last_kl(records: Sequence[StepRecord]) -> float:
    """Return the last measured KL; NaN if there is none."""
    return next((r.kl for r in reversed(records) if math.isfinite(r.kl)), math.nan)


def gold_curve(records: Sequence[StepRecord], *, min_gold: int) -> CurveFit | None:
    """Fit Gao's curve for reinforcement learning to a run's gold checks; None if they are too few.

    Parameters
    ----------
    records : sequence of StepRecord
        The curve starts at the first one with gold: check gold before the policy moves.
    min_gold : int
        Minimum number of checks at different KL > 0, not counting the first.

    Returns
    -------
    CurveFit or None
    """
    # A check needs both: gold and the KL at which it was taken.
    checks = [r for r in records if math.isfinite(r.gold) and math.isfinite(r.kl)]
    # The first check is the curve's origin and no point of it.
    d = np.array([math.sqrt(max(r.kl, 0.0)) for r in checks[1:]])
    if len(np.unique(d[d > 0])) < max(min_gold, 3):
        return None
    gold = np.array([r.gold - checks[0].gold for r in checks[1:]])
    return fit_curve(d, gold, form="rl")
