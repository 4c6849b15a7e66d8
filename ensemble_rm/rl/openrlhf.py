"""The ensemble as OpenRLHF's ``reward_func(queries, prompts, labels)`` (0.11).

OpenRLHF sends text that is in the policy's template already, which in general cannot be undone:
members have templates of their own. So the messages travel in `labels`, and of the query only the
completion is read. Imports no OpenRLHF.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ensemble_rm.errors import OptionError
from ensemble_rm.rl.chat import read_query
from ensemble_rm.rl.gathering import GatheredScores
from ensemble_rm.rl.pinned import PinnedEnsemble, Tokens
from ensemble_rm.rl.scoring import LoopRewards
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import Aggregator
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

OpenRLHFReward: TypeAlias = Callable[
    [Sequence[str], Sequence[str], Sequence[object]], dict[str, Any]
]


def openrlhf_reward(
    ensemble: RewardEnsemble | str | Path,
    *,
    stop: Sequence[str],
    raw_text_members: Sequence[str] = (),
    aggregator: Aggregator | None = None,
    device: str | None = None,
    backbone: str | Path | None = None,
    max_loaded_models: int | None = None,
    tokens: Tokens | None = None,
    digest: str | None = None,
) -> OpenRLHFReward:
    """Make the function that OpenRLHF's ``--reward.remote_url FILE.py`` looks for.

    It is called in a thread with one sample; calls that come together are scored together.

    Parameters
    ----------
    ensemble : RewardEnsemble, str or Path
    stop : sequence of str
        What ends a turn in the policy's template, such as ``<|im_end|>``: OpenRLHF keeps special
        tokens, and no member should read them. Cut from the completion's end.
    raw_text_members : sequence of str
        Members that may score a prompt in the policy's own template, where a label holds no
        messages: all of the ensemble's, or the sample is refused.
    aggregator, device, backbone, max_loaded_models, tokens, digest : optional
        As of `PinnedEnsemble`.

    Returns
    -------
    callable
        ``reward_func(queries, prompts, labels)``. A label is JSON: a list of messages, or an object
        with ``"prompt"`` (text or messages) and, for a baseline, ``"reference"``. ``extra_logs``
        hold the members' mean and their spread, which is left out for every sample where there is
        one member, or the aggregator leaves members out: some samples would have none.

    Raises
    ------
    OptionError
        If `raw_text_members` are not the ensemble's; at the first call.
    """
    gathered = GatheredScores(
        PinnedEnsemble(
            ensemble,
            aggregator=aggregator,
            device=device,
            backbone=backbone,
            max_loaded_models=max_loaded_models,
            tokens=tokens,
            digest=digest,
        )
    )

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[object]
    ) -> dict[str, Any]:
        """Return the rewards; a sample that cannot be scored is an error by its own name.

        OpenRLHF logs it, and ends the step: it has no missing rewards, and 0.0 would be a lie.
        """
        if not len(queries) == len(prompts) == len(labels):
            raise OptionError(
                f"{len(queries)} queries, {len(prompts)} prompts and {len(labels)} labels"
            )
        names = gathered.pinned.ensemble.names
        if unknown := sorted(set(raw_text_members) - set(names)):
            raise OptionError(f"no member {unknown[0]!r}; there are {', '.join(names)}")
        refusing = [name for name in names if name not in raw_text_members]
        samples = [
            read_query(query, prompt, label, stop=stop, refusing=refusing)
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        rewards = gathered(samples)
        for error in rewards.errors:
            if error is not None:
                raise error
        return answer(rewards, spread=logs_spread(gathered.pinned.ensemble))

    return reward_func


def logs_spread(ensemble: RewardEnsemble) -> bool:
    """Whether every sample that has a reward has a spread of its members, too.

    OpenRLHF asks for one sample at a time, and collects the same logs of all of them. Where the
    aggregator leaves members out, a sample may have a single score, which has no spread.
    """
    return len(ensemble.names) > 1 and ensemble.aggregator.nan == "raise"


def answer(rewards: LoopRewards, *, spread: bool) -> dict[str, Any]:
    """Return what OpenRLHF reads: a number for one sample, lists for several; all are numeric.

    Parameters
    ----------
    rewards : LoopRewards
    spread : bool
        Whether ``extra_logs`` hold ``member_std``; as `logs_spread` says of the ensemble.
    """
    logs = {"member_mean": np.nanmean(rewards.members, axis=1)}
    if spread:
        logs["member_std"] = member_std(rewards.members)
    found: dict[str, Any] = {"rewards": rewards.reward, "scores": rewards.reward}
    alone = len(rewards) == 1  # it makes a tensor of [value]: a list would be one axis too many

    def plain(values: Any) -> Any:
        return float(values[0]) if alone else [float(v) for v in values]

    said = {name: plain(values) for name, values in found.items()}
    return said | {"extra_logs": {name: plain(values) for name, values in logs.items()}}
