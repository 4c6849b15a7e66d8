"""A live monitor of a run: reward, spread, length, disagreement, KL and gold, against a reference.

Framework-free: a loop hands over each step's samples and rewards. Knows ensembles and rewards; the
rule by which it warns is in `watching`.
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
from ensemble_rm.errors import DataError, OptionError
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
        """Keep what has a reward."""
        rows = [
            i
            for i, (s, error) in enumerate(zip(samples, rewards.errors, strict=True))
            if isinstance(s, Sample) and error is None
        ]
        kept = [s for i in rows if isinstance(s := samples[i], Sample)]
        failed = sum(error is not None for error in rewards.errors) / max(len(rewards), 1)
        lengths = np.log([max(len(s.completion), 1) for s in kept]).reshape(len(kept))
        groups = prompt_groups([s.prompt for s in kept])
        return cls(kept, rewards.reward[rows], rewards.members[rows], groups, lengths, failed)

    @property
    def whole(self) -> NDArray[np.intp]:
        """The rows that every member scored."""
        return np.flatnonzero(~np.isnan(self.members).any(axis=1))


class OverOptimisationMonitor:
    """Follows a run and says when it is held to be going wrong.

    Parameters
    ----------
    ensemble : RewardEnsemble
        That rewards the run. With a calibration, its judgments are the reference.
    rule : AlarmRule, optional
        When to warn.
    aggregators : mapping of str to Aggregator, optional
        Whose length slopes are reported beside the run's own, which is called ``"reward"``; the
        mean and the minimum by default.
    pool : Path, optional
        A JSONL file that gets each step's most disputed pair, for people to judge: rows that
        `ensemble-rm compare` reads.
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
            raise OptionError("'reward' is the run's own aggregator; give this one another name")
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
        """Take in one step.

        Parameters
        ----------
        step : int
            Above the last one's.
        samples : sequence of Sample or Exception
            What was rewarded.
        rewards : LoopRewards
            In the same order.
        kl : float, optional
            From the policy that the run began with, nats a completion, where it was measured.

        Returns
        -------
        list of Alarm
            What is wrong now; empty where nothing is, or where every sample failed.
        """
        if self._records and step <= self._records[-1].step:
            raise OptionError(f"step {step} after step {self._records[-1].step}")
        call = Call.of(samples, rewards)
        if not call.samples:
            return []
        self._records.append(self._record(step, call, math.nan if kl is None else float(kl)))
        if self._pool is not None:
            self._send(step, call)
        return self.alarms()

    def alarms(self) -> list[Alarm]:
        """Return what is wrong at the last step."""
        return self.rule.alarms(
            self._records, aggregator="reward", reference_std=self.reference_std
        )

    def check_gold(self, gold: float, *, kl: float | None = None) -> list[Alarm]:
        """Take in a gold check of the policy at the last step; the first is the run's beginning.

        Parameters
        ----------
        gold : float
            Mean gold of the policy's completions.
        kl : float, optional
            Of the policy now, nats a completion, where the step's was not measured.

        Returns
        -------
        list of Alarm
            What is wrong now.
        """
        if not self._records or not math.isfinite(gold):
            raise OptionError(
                f"a gold check needs a step before it and a finite gold, not {gold!r}"
            )
        last = self._records[-1]
        known = last.kl if kl is None else float(kl)
        if not math.isfinite(known):
            raise OptionError(f"step {last.step} has no KL; measure it, and give it with the gold")
        self._records[-1] = replace(last, gold=float(gold), kl=known)
        return self.alarms()

    def _record(self, step: int, call: Call, kl: float) -> StepRecord:
        slopes = {name: _slope(how, call) for name, how in self._aggregators.items()}
        if self._start is None:
            self._start = float(call.log_length.mean())
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
        with self._pool.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**row, "step": step}, ensure_ascii=False) + "\n")

    def restore(self, path: str | Path, *, until: int) -> None:
        """Go on where a run was cut: its records are this one's, and the first is its beginning.

        Parameters
        ----------
        path : str or Path
            What `save` has written.
        until : int
            The step that the run goes on from; records beyond it are of steps that will be taken
            again.

        Raises
        ------
        OptionError
            If this monitor has seen a step already.
        DataError
            If a line is no record.
        """
        if self._records:
            raise OptionError(f"this monitor has seen step {self._records[-1].step} already")
        found = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(StepRecord.from_json(json.loads(line)))
            except (DataError, json.JSONDecodeError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
        self._records = [record for record in found if record.step <= until]
        self._start = self._records[0].log_length if self._records else None

    def save(self, path: str | Path) -> Path:
        """Write the records as JSONL, one step a line.

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
    """Return the slope of an aggregator's reward on log length, over the samples that it has."""
    reward = how.where_enough(call.members)
    there = ~np.isnan(reward)
    return length_slope(reward[there], call.log_length[there], call.groups[there])


def most_disputed(call: Call) -> dict[str, Any] | None:
    """Return the pair of one prompt on whose margin the members differ most; None without a pair.

    The margins' standard deviation over the members: what all members hold of a prompt is no
    dispute. Of equals, the first.
    """
    whole = call.whole
    best, found = 0.0, None
    for group in range(int(call.groups.max(initial=-1)) + 1):
        rows = whole[call.groups[whole] == group]
        i, j = np.triu_indices(len(rows), 1)
        spread = (call.members[rows[i]] - call.members[rows[j]]).std(axis=1)
        if len(spread) and (place := int(np.argmax(spread))) >= 0 and spread[place] > best:
            best, found = float(spread[place]), (rows[i[place]], rows[j[place]])
    if found is None:
        return None
    first, second = (call.samples[row] for row in found)
    return {
        "prompt": prompt_json(first.prompt),
        "first": first.completion,
        "second": second.completion,
        "margin_std": best,
    }
