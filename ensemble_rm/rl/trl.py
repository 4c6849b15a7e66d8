"""The ensemble as a reward function of TRL's GRPOTrainer and RLOOTrainer.

Imports neither TRL nor torch: the trainers take any callable with a name.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ensemble_rm.arrays import Floats, finite_or_none
from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import CalibrationError, OptionError
from ensemble_rm.rl.chat import to_samples
from ensemble_rm.rl.monitor.measures import (
    disagreement,
    outside_range,
    prompt_groups,
    reference_range,
    within_correlation,
)
from ensemble_rm.rl.pinned import PinnedEnsemble, pinned
from ensemble_rm.rl.scoring import FailurePolicy, LoopRewards, check_policy, score_for_loop
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.calibration.calibration import Calibration
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

LogMetric: TypeAlias = Callable[[str, float], None]
LogExtra: TypeAlias = Callable[[str, list[Any]], None]
Watcher: TypeAlias = Callable[
    ["list[Sample | Exception]", LoopRewards, "list[list[int] | None]"], None
]


class TRLReward:
    """A reward function for TRL's trainers; `trl_reward` makes one.

    Attributes
    ----------
    pinned : PinnedEnsemble
        The version that this run is rewarded by.
    """

    def __init__(
        self,
        pinned: PinnedEnsemble,
        *,
        name: str,
        on_failure: FailurePolicy,
        reference_column: str,
    ) -> None:
        check_policy(on_failure)
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
            raise OptionError(
                f"name must be one word of letters, digits, '_', '.' and '-', not {name!r}"
            )
        self.__name__ = name
        self.pinned = pinned
        self.on_failure: FailurePolicy = on_failure
        self.reference_column = reference_column
        self._watcher: Watcher | None = None

    def watched_by(self, watcher: Watcher) -> None:
        """Pass each call's samples, rewards and sampled tokens to a callable of this process.

        Parameters
        ----------
        watcher : callable
            Called with samples, rewards and, for each sample, the policy's token ids; None where
            they are not those of the scored completion alone.
        """
        self._watcher = watcher

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_watcher": None}

    def __call__(
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: LogMetric | None = None,
        log_extra: LogExtra | None = None,
        trainer_state: object = None,  # noqa: ARG002 - TRL's
        **columns: Any,
    ) -> list[float | None]:
        """Return one reward per completion, None for a failed one.

        Parameters
        ----------
        prompts, completions : sequence of str or of messages
            One prompt per completion.
        completion_ids : sequence of sequence of int, optional
            The policy's tokens, for the watcher; members have tokenizers of their own.
        log_metric, log_extra : callable, optional
            TRL's loggers: a metric of the call, a column of the completions table.
        trainer_state : object, optional
            Ignored.
        **columns
            Other columns of the data set; `reference_column` is read.
        """
        samples, rewards = self._score(prompts, completions, columns.get(self.reference_column))
        self._watch(samples, rewards, completions, completion_ids)
        self._log(samples, rewards, log_metric, log_extra)
        return rewards.listed()

    def _score(
        self, prompts: Sequence[object], completions: Sequence[object], references: Any
    ) -> tuple[list[Sample | Exception], LoopRewards]:
        samples = to_samples(prompts, completions, references)
        rewards = score_for_loop(
            self.pinned.ensemble,
            samples,
            on_failure=self.on_failure,
            with_references=self._calibration() is not None,
        )
        return samples, rewards

    def _calibration(self) -> Calibration | None:
        """Return the calibration if it belongs to the aggregator of this reward."""
        from ensemble_rm.calibration.calibration import require_calibration

        ensemble = self.pinned.ensemble
        try:
            return require_calibration(ensemble.calibration, ensemble.aggregator)
        except CalibrationError:
            return None

    def _watch(
        self,
        samples: list[Sample | Exception],
        rewards: LoopRewards,
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None,
    ) -> None:
        if self._watcher is None:
            return
        tokens: list[list[int] | None] = [None] * len(samples)
        if completion_ids is not None:
            # After tool calls the tokens are those of several messages and of the tools.
            tokens = [
                list(ids)
                if isinstance(completion, str)
                or (isinstance(completion, list) and len(completion) == 1)
                else None
                for completion, ids in zip(completions, completion_ids, strict=True)
            ]
        self._watcher(samples, rewards, tokens)

    def _log(
        self,
        samples: list[Sample | Exception],
        rewards: LoopRewards,
        log_metric: LogMetric | None,
        log_extra: LogExtra | None,
    ) -> None:
        if log_metric is None and log_extra is None:
            return
        beats = self._beats_reference(rewards)
        if log_metric is not None:
            for name, value in self._metrics(samples, rewards, beats).items():
                if np.isfinite(value):  # TRL averages over ranks: one NaN would make all NaN
                    log_metric(f"{self.__name__}/{name}", float(value))
        if log_extra is not None:
            for name, values in self._columns(rewards, beats).items():
                log_extra(f"{self.__name__}/{name}", values)

    def _beats_reference(self, rewards: LoopRewards) -> Floats:
        """Return P(completion preferred to its reference); NaN where it is unknown."""
        calibration = self._calibration()
        margin = rewards.reward - rewards.reference_reward
        probability = np.full(len(margin), np.nan)
        known = np.isfinite(margin)
        if calibration is not None and known.any():
            probability[known] = calibration.probability(margin[known])
        return probability

    def _span(self) -> Floats | None:
        calibration = self.pinned.ensemble.calibration
        evidence = None if calibration is None else calibration.evidence
        return None if evidence is None else reference_range(evidence)

    def _metrics(
        self, samples: list[Sample | Exception], rewards: LoopRewards, beats: Floats
    ) -> dict[str, float]:
        failed = np.isin(np.arange(len(rewards)), list(rewards.failed))
        kept = [s.prompt for s in samples if isinstance(s, Sample)]
        read = np.array([isinstance(s, Sample) for s in samples], dtype=np.bool_)
        groups = prompt_groups(kept)[~failed[read]]
        # Measures that compare members leave out rows in which one is missing (nan="omit").
        whole = np.isfinite(rewards.members[~failed]).all(axis=1)
        members, groups = rewards.members[~failed][whole], groups[whole]
        metrics = {"failed": float(failed.mean()), "version": version_number(self.pinned.version)}
        if members.shape[1] > 1 and len(members):
            metrics["member_std"] = float(members.std(axis=1, ddof=1).mean())
            metrics["disagreement"] = disagreement(members, groups)
            metrics["member_correlation"] = within_correlation(members, groups)
        if (span := self._span()) is not None and len(members):
            shares = outside_range(members, span).mean(axis=0)
            for name, share in zip(self.pinned.ensemble.names, shares, strict=True):
                metrics[f"outside_range/{name}"] = float(share)
        if np.isfinite(beats).any():
            metrics["beats_reference"] = float(np.nanmean(beats))
        return metrics

    def _columns(self, rewards: LoopRewards, beats: Floats) -> dict[str, list[Any]]:
        members, span = rewards.members, self._span()
        columns: dict[str, list[Any]] = {
            "version": [self.pinned.version] * len(rewards),
            "failure": list(rewards.failures),
        }
        if members.shape[1] > 1:
            columns["member_std"] = finite_or_none(member_std(members, nan="omit"))
        for name, column in zip(self.pinned.ensemble.names, members.T, strict=True):
            columns[f"score/{name}"] = finite_or_none(column)
        if span is not None:
            counts = outside_range(members, span).sum(axis=1)
            columns["outside_range"] = finite_or_none(
                np.where(np.isnan(members).any(axis=1), np.nan, counts)
            )
        if np.isfinite(beats).any():
            columns["beats_reference"] = finite_or_none(beats)
        return columns


class AsyncTRLReward(TRLReward):
    """The coroutine version: members score in a thread while other reward functions run."""

    async def __call__(  # type: ignore[override]
        self,
        prompts: Sequence[object],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: LogMetric | None = None,
        log_extra: LogExtra | None = None,
        trainer_state: object = None,  # noqa: ARG002 - TRL's
        **columns: Any,
    ) -> list[float | None]:
        """Return one reward per completion, as `TRLReward` does."""
        references = columns.get(self.reference_column)
        samples, rewards = await asyncio.to_thread(self._score, prompts, completions, references)
        self._watch(samples, rewards, completions, completion_ids)
        self._log(samples, rewards, log_metric, log_extra)
        return rewards.listed()


def version_number(version: str) -> float:
    """Return the version as a metric: a whole number below 65,536 that changes with it.

    TRL averages metrics in float32, which sixteen bits of a digest survive exactly.
    """
    return float(int(hashlib.sha256(version.encode()).hexdigest()[:4], 16))


def trl_reward(
    ensemble: RewardEnsemble | PinnedEnsemble,
    *,
    name: str = "ensemble",
    on_failure: FailurePolicy = "none",
    asynchronous: bool = False,
    reference_column: str = "reference",
) -> TRLReward:
    """Make the callable that TRL's GRPOTrainer and RLOOTrainer take as `reward_funcs`.

    Give the ensemble as this one function. TRL adds several reward functions with `nansum`, where a
    member that fails would silently lower the total.

    Parameters
    ----------
    ensemble : RewardEnsemble or PinnedEnsemble
        A live ensemble; or a saved one as ``PinnedEnsemble(folder, device=...)``, which is loaded
        at the first call and can be sent to other processes. Probabilities are logged only under
        the calibrated aggregator.
    name : str
        Name in TRL's logs: ``rewards/NAME/mean``, and the metrics below ``NAME/``.
    on_failure : {"none", "raise"}
        Whether a sample that cannot be scored has no reward (None), or ends the run. If every
        sample of a call fails, the run ends in either case.
    asynchronous : bool
        Whether the callable is a coroutine function, which TRL runs concurrently with others.
    reference_column : str
        Column of the data set with reference completions, if there is one.

    Returns
    -------
    TRLReward
        A sample's reward does not depend on the others: groups that are split across ranks get the
        same rewards.

    Raises
    ------
    OptionError
        If an option has a wrong value, or `ensemble` is a folder.
    """
    kind = AsyncTRLReward if asynchronous else TRLReward
    return kind(
        pinned(ensemble), name=name, on_failure=on_failure, reference_column=reference_column
    )
