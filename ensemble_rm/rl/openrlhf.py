"""The ensemble as OpenRLHF's ``reward_func(queries, prompts, labels)`` (0.11).

OpenRLHF sends text in the policy's template, which in general cannot be undone, and members have
templates of their own. So messages are sent in `labels`, and only the completion is read from the
query. Does not import OpenRLHF.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ensemble_rm.errors import OptionError
from ensemble_rm.rl.batching import ThreadBatcher
from ensemble_rm.rl.chat import read_query
from ensemble_rm.rl.pinned import PinnedEnsemble, pinned
from ensemble_rm.rl.scoring import LoopRewards
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

OpenRLHFReward: TypeAlias = Callable[
    [Sequence[str], Sequence[str], Sequence[object]], dict[str, Any]
]


def openrlhf_reward(
    ensemble: RewardEnsemble | PinnedEnsemble,
    *,
    stop: Sequence[str],
    raw_text_members: Sequence[str] = (),
) -> OpenRLHFReward:
    """Make the function that OpenRLHF's ``--reward.remote_url FILE.py`` looks for.

    OpenRLHF calls it from threads with one sample each; concurrent calls are scored together.

    Parameters
    ----------
    ensemble : RewardEnsemble or PinnedEnsemble
        A live ensemble; or a saved one as ``PinnedEnsemble(folder, device=...)``.
    stop : sequence of str
        Tokens that end a turn in the policy's template, such as ``<|im_end|>``. OpenRLHF keeps
        them; they are removed from the end of the completion.
    raw_text_members : sequence of str
        Members that may score a prompt in the policy's template, for labels without messages. If
        not all members are in it, such a sample is refused.

    Returns
    -------
    callable
        ``reward_func(queries, prompts, labels)``. A label is JSON: a list of messages, or an object
        with ``"prompt"`` (text or messages) and, for a baseline, ``"reference"``. ``extra_logs``
        has the members' mean and standard deviation; the latter is left out for every sample if
        some samples may have none: with one member, or an aggregator that leaves members out.

    Raises
    ------
    OptionError
        If `ensemble` is a folder; at the first call, if `raw_text_members` are not its members.
    """
    batcher = ThreadBatcher(pinned(ensemble))

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object]
    ) -> dict[str, Any]:
        """Return the rewards, or raise the error of a sample that cannot be scored.

        OpenRLHF logs the error and ends the step: it has no missing rewards.
        """
        if not len(queries) == len(prompts) == len(labels):
            raise OptionError(
                f"{len(queries)} queries, {len(prompts)} prompts and {len(labels)} labels; the "
                "numbers must be equal"
            )
        names = batcher.pinned.ensemble.names
        if unknown := sorted(set(raw_text_members) - set(names)):
            raise OptionError(
                f"raw_text_members: no member {unknown[0]!r}; the members are {', '.join(names)}"
            )
        refusing = [name for name in names if name not in raw_text_members]
        samples = [
            read_query(query, prompt, label, stop=stop, refusing=refusing)
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        rewards = batcher(samples)
        # OpenRLHF reads no failed samples; a NaN in a batch would spoil its advantages.
        for error in rewards.failed.values():
            raise error
        return answer(rewards, spread=logs_spread(batcher.pinned.ensemble))

    return reward_func


def logs_spread(ensemble: RewardEnsemble) -> bool:
    """Return whether every sample that has a reward also has a standard deviation over members.

    OpenRLHF asks for one sample at a time and collects the same logs of all. If the aggregator
    leaves members out, a sample may have a single score, which has none.
    """
    return len(ensemble.names) > 1 and ensemble.aggregator.nan == "raise"


def answer(rewards: LoopRewards, *, spread: bool) -> dict[str, Any]:
    """Return what OpenRLHF reads: a number for one sample, lists for several.

    Parameters
    ----------
    rewards : LoopRewards
    spread : bool
        Whether ``extra_logs`` has ``member_std``; see `logs_spread`.
    """
    # Members that failed are left out of the log's mean.
    logs = {"member_mean": np.nanmean(rewards.members, axis=1)}
    if spread:
        logs["member_std"] = member_std(rewards.members)
    values: dict[str, Any] = {"rewards": rewards.reward, "scores": rewards.reward}
    alone = len(rewards) == 1  # OpenRLHF makes a tensor of [value]: a list would add an axis

    def plain(column: Any) -> Any:
        return float(column[0]) if alone else [float(value) for value in column]

    numbers = {name: plain(column) for name, column in values.items()}
    return numbers | {"extra_logs": {name: plain(column) for name, column in logs.items()}}
