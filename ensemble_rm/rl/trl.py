"""The ensemble as a reward function of TRL's GRPOTrainer and RLOOTrainer.

Imports neither TRL nor torch: what the trainers take is a callable with a name.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ensemble_rm.arrays import Floats, finite_or_none
from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import CalibrationError, OptionError
from ensemble_rm.rl.chat import read_samples
from ensemble_rm.rl.monitor.measures import (
    disagreement,
    outside_range,
    prompt_groups,
    reference_range,
    within_correlation,
)
from ensemble_rm.rl.pinned import PinnedEnsemble, Tokens
from ensemble_rm.rl.scoring import FailurePolicy, LoopRewards, check_policy, score_for_loop
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import Aggregator
    from ensemble_rm.calibration.calibration import Calibration
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

LogMetric: TypeAlias = Callable[[str, float], None]
LogExtra: TypeAlias = Callable[[str, list[Any]], None]
Watcher: TypeAlias = Callable[
    ["list[Sample | Exception]", LoopRewards, "list[list[int] | None]"], None
]


class TRLReward:
    """A reward function of TRL: call it as the trainers do. `trl_reward` makes one.

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
            raise OptionError(f"name must be a short word for logs, not {name!r}")
        self.__name__ = name
        self.pinned = pinned
        self.on_failure: FailurePolicy = on_failure
        self.reference_column = reference_column
        self._watcher: Watcher | None = None

    def watched_by(self, watcher: Watcher) -> None:
        """Hand each call's samples, rewards and sampled tokens to a watcher of this process.

        Parameters
        ----------
        watcher : callable
            Of samples, rewards and, for each sample, the policy's own token ids: None where they
            are not those of the scored completion alone.
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
        """Return one reward a completion, None for a failed one.

        Parameters
        ----------
        prompts, completions : sequence of str or of messages
            One prompt a completion.
        completion_ids : sequence of sequence of int, optional
            The policy's own tokens, for a watcher: each member has a tokenizer of its own.
        log_metric, log_extra : callable, optional
            TRL's, for a figure of the call and for a column of the completions table.
        trainer_state : object, optional
            Not read.
        **columns
            The data set's other columns; the one that holds references is read.
        """
        samples, rewards = self._score(prompts, completions, columns.get(self.reference_column))
        self._watch(samples, rewards, completions, completion_ids)
        self._log(samples, rewards, log_metric, log_extra)
        return rewards.listed()

    def _score(
        self, prompts: Sequence[object], completions: Sequence[object], references: Any
    ) -> tuple[list[Sample | Exception], LoopRewards]:
        samples = read_samples(prompts, completions, references)
        rewards = score_for_loop(
            self.pinned.ensemble,
            samples,
            on_failure=self.on_failure,
            with_references=self._calibration() is not None,
        )
        return samples, rewards

    def _calibration(self) -> Calibration | None:
        """Return the calibration, where it belongs to the aggregator of this reward."""
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
            # After calls of tools the tokens are those of several messages, and of the tools.
            tokens = [
                list(ids)
                if isinstance(said, str) or (isinstance(said, list) and len(said) == 1)
                else None
                for said, ids in zip(completions, completion_ids, strict=True)
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
                if np.isfinite(value):  # one NaN would be the mean of all ranks
                    log_metric(f"{self.__name__}/{name}", float(value))
        if log_extra is not None:
            for name, values in self._columns(rewards, beats).items():
                log_extra(f"{self.__name__}/{name}", values)

    def _beats_reference(self, rewards: LoopRewards) -> Floats:
        """Return P(a completion is preferred to its reference); NaN where it is not known."""
        calibration = self._calibration()
        margin = rewards.reward - rewards.reference_reward
        found = np.full(len(margin), np.nan)
        known = np.isfinite(margin)
        if calibration is not None and known.any():
            found[known] = calibration.probability(margin[known])
        return found

    def _span(self) -> Floats | None:
        calibration = self.pinned.ensemble.calibration
        evidence = None if calibration is None else calibration.evidence
        return None if evidence is None else reference_range(evidence)

    def _metrics(
        self, samples: list[Sample | Exception], rewards: LoopRewards, beats: Floats
    ) -> dict[str, float]:
        failed = np.array([error is not None for error in rewards.errors], dtype=np.bool_)
        kept = [s.prompt for s in samples if isinstance(s, Sample)]
        read = np.array([isinstance(s, Sample) for s in samples], dtype=np.bool_)
        groups = prompt_groups(kept)[~failed[read]]
        # A member that is missing in a row (nan="omit") takes the row out of what compares members.
        whole = np.isfinite(rewards.members[~failed]).all(axis=1)
        members, groups = rewards.members[~failed][whole], groups[whole]
        found = {"failed": float(failed.mean()), "version": version_number(self.pinned.version)}
        if members.shape[1] > 1 and len(members):
            found["member_std"] = float(members.std(axis=1, ddof=1).mean())
            found["disagreement"] = disagreement(members, groups)
            found["member_correlation"] = within_correlation(members, groups)
        if (span := self._span()) is not None and len(members):
            shares = outside_range(members, span).mean(axis=0)
            for name, share in zip(self.pinned.ensemble.names, shares, strict=True):
                found[f"outside_range/{name}"] = float(share)
        if np.isfinite(beats).any():
            found["beats_reference"] = float(np.nanmean(beats))
        return found

    def _columns(self, rewards: LoopRewards, beats: Floats) -> dict[str, list[Any]]:
        members, span = rewards.members, self._span()
        found: dict[str, list[Any]] = {
            "version": [self.pinned.version] * len(rewards),
            "failure": list(rewards.failures),
        }
        if members.shape[1] > 1:
            found["member_std"] = finite_or_none(member_std(members, nan="omit"))
        for name, column in zip(self.pinned.ensemble.names, members.T, strict=True):
            found[f"score/{name}"] = finite_or_none(column)
        if span is not None:
            counts = outside_range(members, span).sum(axis=1)
            counts = np.where(np.isnan(members).any(axis=1), np.nan, counts)
            found["outside_range"] = finite_or_none(counts)
        if np.isfinite(beats).any():
            found["beats_reference"] = finite_or_none(beats)
        return found


class AsyncTRLReward(TRLReward):
    """The same, awaited: members score in a thread while other reward functions run."""

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
        """Return what the synchronous one returns."""
        references = columns.get(self.reference_column)
        found = await asyncio.to_thread(self._score, prompts, completions, references)
        self._watch(*found, completions, completion_ids)
        self._log(*found, log_metric, log_extra)
        return found[1].listed()


def version_number(version: str) -> float:
    """Return the version as a metric: a whole number below 65,536 that changes where it does.

    TRL logs metrics in float32 and averages them: sixteen bits of a digest survive that exactly.
    """
    return float(int(hashlib.sha256(version.encode()).hexdigest()[:4], 16))


def trl_reward(
    ensemble: RewardEnsemble | str | Path,
    *,
    aggregator: Aggregator | None = None,
    name: str = "ensemble",
    on_failure: FailurePolicy = "none",
    asynchronous: bool = False,
    reference_column: str = "reference",
    device: str | None = None,
    backbone: str | Path | None = None,
    max_loaded_models: int | None = None,
    tokens: Tokens | None = None,
    digest: str | None = None,
) -> TRLReward:
    """Make the callable that TRL's GRPOTrainer and RLOOTrainer take as `reward_funcs`.

    Give the ensemble as this one function: TRL adds several up with `nansum`, where a member that
    fails would silently lower the total.

    Parameters
    ----------
    ensemble : RewardEnsemble, str or Path
        A live one, or the folder of a saved one: it is then loaded at the first call, crosses to
        other processes by its name, and must stay as it is until the run ends.
    aggregator : Aggregator, optional
        Of the reward; the ensemble's own where not given. Under another than the calibrated one
        no probability is logged.
    name : str
        Under which TRL logs it: ``rewards/NAME/mean``, and the metrics below ``NAME/``.
    on_failure : {"none", "raise"}
        Whether a sample that cannot be scored has no reward (None), or ends the run. Where every
        sample of a call fails the run ends in either case.
    asynchronous : bool
        Whether the callable is a coroutine function, which TRL gathers with others.
    reference_column : str
        The data set's column of reference completions, where it has one.
    device : str, optional
        Where a saved ensemble runs, which must be said; see `PinnedEnsemble`.
    backbone : str or Path, optional
        Where the backbone lies now, if not where training found it.
    max_loaded_models : int, optional
        Models in memory at once; all by default.
    tokens : mapping, optional
        Of members on other servers, by name; see `PinnedEnsemble`.
    digest : str, optional
        What a saved ensemble must be; see `PinnedEnsemble`.

    Returns
    -------
    TRLReward
        With a readable ``__name__``. Each sample's reward is its own: groups that are split across
        ranks score as whole ones do.

    Raises
    ------
    OptionError
        If an option has no meaning for this ensemble, or a folder comes without a device.
    StorageError
        If the folder holds no ensemble.
    PinnedVersionError
        If it is not the one of that digest.
    """
    pinned = PinnedEnsemble(
        ensemble,
        aggregator=aggregator,
        device=device,
        backbone=backbone,
        max_loaded_models=max_loaded_models,
        tokens=tokens,
        digest=digest,
    )
    kind = AsyncTRLReward if asynchronous else TRLReward
    return kind(pinned, name=name, on_failure=on_failure, reference_column=reference_column)
