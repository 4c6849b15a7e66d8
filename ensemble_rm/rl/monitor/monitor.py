"""A monitor of an RL run: reward, spread, length, disagreement, KL and gold reward.

It works with any trainer: pass it the samples and rewards of each step. `alarms` has the rule that
raises alarms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.aggregation.rules.mean import mean
from ensemble_rm.aggregation.rules.minimum import minimum
from ensemble_rm.arrays import Floats
from ensemble_rm.data.samples import Sample, prompt_json
from ensemble_rm.errors import DataError, OptionError, SchemaError
from ensemble_rm.rl.monitor.alarms import Alarm, AlarmRule, StepRecord, mean_of
from ensemble_rm.rl.monitor.measures import (
    disagreement,
    length_controlled,
    length_slope,
    outside_range,
    prompt_groups,
    reference_range,
)
from ensemble_rm.rl.scoring import LoopRewards
from ensemble_rm.saved_json import parse_json
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble


@dataclass(frozen=True)
class Call:
    """One reward call, without its failed samples."""

    samples: list[Sample]
    reward: Floats
    members: Floats  # (n, k)
    groups: NDArray[np.int64]
    log_length: Floats
    failed: float

    @classmethod
    def of(cls, samples: Sequence[Sample | Exception], rewards: LoopRewards) -> Call:
        """Keep the samples that have a reward."""
        rows = [
            i
            for i, sample in enumerate(samples)
            if isinstance(sample, Sample) and i not in rewards.failed
        ]
        kept = [s for i in rows if isinstance(s := samples[i], Sample)]
        failed = len(rewards.failed) / max(len(rewards), 1)
        # At least one character: an empty completion has no logarithm.
        lengths = np.log([max(len(s.completion), 1) for s in kept]).reshape(len(kept))
        groups = prompt_groups([s.prompt for s in kept])
        return cls(kept, rewards.reward[rows], rewards.members[rows], groups, lengths, failed)

    @property
    def whole(self) -> NDArray[np.intp]:
        """Rows that every member scored."""
        return np.flatnonzero(~np.isnan(self.members).any(axis=1))


class OverOptimisationMonitor:
    """Monitors a run for over-optimisation and raises alarms.

    Parameters
    ----------
    ensemble : RewardEnsemble
        The ensemble that rewards the run. If it is calibrated, its judgments are the reference.
    rule : AlarmRule, optional
        When to raise an alarm.
    aggregators : mapping of str to Aggregator, optional
        Further aggregators whose length slopes are recorded, next to that of the run's own, which
        is called ``"reward"`` (default: mean and minimum).
    pool : Path, optional
        A JSONL file to which each step's most disputed pair is appended, for people to judge, in
        the format that `ensemble-rm compare` reads.
    """

    def __init__(
        self,
        ensemble: RewardEnsemble,
        *,
        rule: AlarmRule | None = None,
        aggregators: Mapping[str, Aggregator] | None = None,
        pool: str | Path | None = None,
    ) -> None:
        self.rule = rule or AlarmRule()
        given = {"mean": mean(), "minimum": minimum()} if aggregators is None else aggregators
        if "reward" in given:
            raise OptionError("'reward' is the run's own aggregator; choose another name")
        # Another NaN policy would fail on rows that the run's own aggregator accepts.
        nan = ensemble.aggregator.nan
        others = {name: replace(how, nan=nan).bind(ensemble.names) for name, how in given.items()}
        self._aggregators = {"reward": ensemble.aggregator, **others}
        self._pool = None if pool is None else Path(pool)
        self._several = len(ensemble.names) > 1
        self._span: Floats | None = None
        self.reference_std: float | None = None
        calibration = ensemble.calibration
        if calibration is not None and (evidence := calibration.evidence) is not None:
            self._span = reference_range(evidence)
            if self._several:
                judged = np.concatenate([evidence.first, evidence.second])
                # The spread that the members had where people judged: what is usual.
                usual = mean_of(member_std(judged, nan="omit").tolist())
                self.reference_std = None if math.isnan(usual) else usual
        self._records: list[StepRecord] = []
        self._start: float | None = None  # mean log length of the first step

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """Every step so far."""
        return tuple(self._records)

    def observe(
        self,
        step: int,
        samples: Sequence[Sample | Exception],
        rewards: LoopRewards,
        *,
        kl: float | None = None,
    ) -> list[Alarm]:
        """Record one step.

        Parameters
        ----------
        step : int
            Greater than the last one.
        samples : sequence of Sample or Exception
            The samples of the step.
        rewards : LoopRewards
            Their rewards, in the same order.
        kl : float, optional
            KL from the policy that the run started with, nats per completion, if measured.

        Returns
        -------
        list of Alarm
            The alarms at this step; empty as well if every sample failed.
        """
        if self._records and step <= self._records[-1].step:
            raise OptionError(f"step must be greater than {self._records[-1].step}, not {step}")
        call = Call.of(samples, rewards)
        # All samples failed: there is nothing to record, and a row of NaN would hide the last one.
        if not call.samples:
            return []
        self._records.append(self._record(step, call, math.nan if kl is None else float(kl)))
        if self._pool is not None:
            self._send(step, call)
        return self.alarms()

    def alarms(self) -> list[Alarm]:
        """Return the alarms at the last step."""
        return self.rule.alarms(
            self._records, aggregator="reward", reference_std=self.reference_std
        )

    def check_gold(self, gold: float, *, kl: float | None = None) -> list[Alarm]:
        """Record a gold check at the last step; the first check is the start of Gao's curve.

        Parameters
        ----------
        gold : float
            Mean gold reward of the policy's completions.
        kl : float, optional
            KL of the policy, nats per completion, if the step's was not measured.

        Returns
        -------
        list of Alarm
            The alarms now.
        """
        if not self._records or not math.isfinite(gold):
            raise OptionError(
                f"a gold check needs a recorded step and a finite value, not {gold!r}"
            )
        last = self._records[-1]
        known = last.kl if kl is None else float(kl)
        if not math.isfinite(known):
            raise OptionError(f"step {last.step} has no KL; measure it and pass it as kl")
        self._records[-1] = replace(last, gold=float(gold), kl=known)
        return self.alarms()

    def _record(self, step: int, call: Call, kl: float) -> StepRecord:
        slopes = {name: _slope(how, call) for name, how in self._aggregators.items()}
        # Lengths are controlled against the run's first step, not against each step's own mean.
        if self._start is None:
            self._start = float(call.log_length.mean())
        # Without different lengths within a prompt there is nothing to control for.
        slope = slopes["reward"] if math.isfinite(slopes["reward"]) else 0.0
        controlled = length_controlled(call.reward, call.log_length, slope, self._start)
        spread = divided = math.nan
        there = ~np.isnan(call.members)
        if self._several:
            spread = mean_of(member_std(call.members, nan="omit").tolist())
            whole = call.whole
            divided = disagreement(call.members[whole], call.groups[whole])
        outside = math.nan
        if self._span is not None:
            # Of the scores that are there: missing ones are counted by themselves.
            outside = float(outside_range(call.members, self._span).sum() / there.sum())
        return StepRecord(
            step=step,
            reward=float(call.reward.mean()),
            length_controlled=float(controlled.mean()),
            member_std=spread,
            disagreement=divided,
            log_length=float(call.log_length.mean()),
            length_slopes=slopes,
            outside_range=outside,
            failed=call.failed,
            kl=kl,
            missing=1.0 - float(there.mean()),
        )

    def _send(self, step: int, call: Call) -> None:
        row = most_disputed(call)
        if row is None or self._pool is None:
            return
        self._pool.parent.mkdir(parents=True, exist_ok=True)
        # Appended and closed each time: a killed run keeps what it has sent.
        with self._pool.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**row, "step": step}, ensure_ascii=False) + "\n")

    def restore(self, path: str | Path, *, until: int) -> None:
        """Continue an interrupted run with its records.

        Parameters
        ----------
        path : str or Path
            A file that `save` wrote.
        until : int
            Step from which the run continues; later records are dropped, since those steps are
            repeated.

        Raises
        ------
        OptionError
            If this monitor has recorded a step.
        DataError
            If a line is not a record.
        """
        if self._records:
            last = self._records[-1].step
            raise OptionError(f"this monitor has already recorded step {last}; use a new one")
        records = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(StepRecord.from_json(parse_json(line)))
            except (DataError, SchemaError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
        # Steps after the checkpoint are run again.
        self._records = [record for record in records if record.step <= until]
        self._start = self._records[0].log_length if self._records else None

    def save(self, path: str | Path) -> Path:
        """Write the records as JSONL, one step per line.

        Parameters
        ----------
        path : str or Path

        Returns
        -------
        Path
        """
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(record.to_json()) + "\n" for record in self._records)
        file.write_text("".join(lines), encoding="utf-8")
        return file


def _slope(how: Aggregator, call: Call) -> float:
    """Return the slope of an aggregator's reward on log length, over the samples that it scores."""
    # Another rule may need more members than this row has.
    reward = how.where_enough(call.members)
    there = ~np.isnan(reward)
    return length_slope(reward[there], call.log_length[there], call.groups[there])


def most_disputed(call: Call) -> dict[str, Any] | None:
    """Return the pair of completions of one prompt on which the members differ most; None if none.

    Measured by the std over members of the margin, in which an offset that all members give to a
    prompt cancels. Of equal pairs, the first.
    """
    whole = call.whole
    best, pair = 0.0, None
    for group in range(int(call.groups.max(initial=-1)) + 1):
        rows = whole[call.groups[whole] == group]
        i, j = np.triu_indices(len(rows), 1)
        # Spread of the members' margins between two completions, shape (n_pairs,).
        spread = (call.members[rows[i]] - call.members[rows[j]]).std(axis=1)
        if len(spread) and (row := int(np.argmax(spread))) >= 0 and spread[row] > best:
            best, pair = float(spread[row]), (rows[i[row]], rows[j[row]])
    if pair is None:
        return None
    first, second = (call.samples[row] for row in pair)
    return {
        "prompt": prompt_json(first.prompt),
        "first": first.completion,
        "second": second.completion,
        "margin_std": best,
    }
