"""The ensemble as veRL's ``compute_score`` (0.9).

veRL sends the response alone, without special tokens; the prompt is sent in `extra_info`. Does not
import veRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ensemble_rm.data.samples import Sample, as_prompt
from ensemble_rm.errors import DataError
from ensemble_rm.rl.batching import ThreadBatcher
from ensemble_rm.rl.pinned import PinnedEnsemble, pinned
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

VerlReward: TypeAlias = Callable[..., dict[str, float]]


def verl_reward(ensemble: RewardEnsemble | PinnedEnsemble) -> VerlReward:
    """Make the function that veRL's ``reward.custom_reward_function`` names.

    veRL calls it from threads with one sample each; concurrent calls are scored together.

    Parameters
    ----------
    ensemble : RewardEnsemble or PinnedEnsemble
        A live ensemble; or a saved one as ``PinnedEnsemble(folder, device=...)``.

    Returns
    -------
    callable
        ``compute_score(data_source, solution_str, ground_truth, extra_info)``, which returns the
        same keys for every sample: ``score``, ``member_mean``, ``member_std`` (NaN for one member),
        ``member_min`` and ``member_max``. ``extra_info["prompt"]`` is the prompt, text or messages;
        ``extra_info["reference"]`` a baseline's reference completion.

    Raises
    ------
    OptionError
        If `ensemble` is a folder.
    """
    batcher = ThreadBatcher(pinned(ensemble))

    def compute_score(
        data_source: object,  # noqa: ARG001 - veRL's
        solution_str: str,
        ground_truth: object,  # noqa: ARG001 - veRL's
        extra_info: Mapping[str, Any] | None = None,
        **_: object,
    ) -> dict[str, float]:
        """Return the sample's score, or raise the error of one that cannot be scored."""
        rewards = batcher([read_response(solution_str, extra_info)])
        for error in rewards.failed.values():
            raise error
        members = rewards.members[0]
        spread = member_std(members[None], nan="omit")[0] if len(members) > 1 else math.nan
        return {
            "score": float(rewards.reward[0]),
            "member_mean": float(np.nanmean(members)),
            "member_std": float(spread),
            "member_min": float(np.nanmin(members)),
            "member_max": float(np.nanmax(members)),
        }

    return compute_score


def read_response(response: str, extra_info: Mapping[str, Any] | None) -> Sample:
    """Return the sample of one response.

    Raises
    ------
    DataError
        If `extra_info` has no prompt, or one that cannot be read.
    """
    prompt = None if extra_info is None else extra_info.get("prompt")
    if prompt is None:
        raise DataError(
            "no prompt: veRL sends the response alone; put each row's prompt, text or messages, in "
            "extra_info['prompt'] of the data set"
        )
    if isinstance(prompt, np.ndarray):  # a list of messages that was read from parquet
        prompt = prompt.tolist()
    reference = None if extra_info is None else extra_info.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise DataError(f"extra_info['reference'] must be text, not {reference!r}")
    return Sample(as_prompt(prompt), response, reference)
