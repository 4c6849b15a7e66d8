"""The ensemble as veRL's ``compute_score`` (0.9).

veRL sends the response alone, special tokens stripped: the prompt travels in `extra_info`. Imports
no veRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ensemble_rm.data.samples import Sample, as_prompt
from ensemble_rm.errors import DataError
from ensemble_rm.rl.gathering import GatheredScores
from ensemble_rm.rl.pinned import PinnedEnsemble, Tokens
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import Aggregator
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

VerlReward: TypeAlias = Callable[..., dict[str, float]]


def verl_reward(
    ensemble: RewardEnsemble | str | Path,
    *,
    aggregator: Aggregator | None = None,
    device: str | None = None,
    backbone: str | Path | None = None,
    max_loaded_models: int | None = None,
    tokens: Tokens | None = None,
    digest: str | None = None,
) -> VerlReward:
    """Make the function that veRL's ``reward.custom_reward_function`` names.

    It is called with one sample, from several threads; calls that come together are scored
    together.

    Parameters
    ----------
    ensemble : RewardEnsemble, str or Path
    aggregator, device, backbone, max_loaded_models, tokens, digest : optional
        As of `PinnedEnsemble`.

    Returns
    -------
    callable
        ``compute_score(data_source, solution_str, ground_truth, extra_info)``, which returns the
        same keys for every sample: ``score``, ``member_mean``, ``member_std`` (NaN for one member),
        ``member_min`` and ``member_max``. The prompt, text or messages, stands in
        ``extra_info["prompt"]``; a baseline's reference in ``extra_info["reference"]``.
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

    def compute_score(
        data_source: object,  # noqa: ARG001 - veRL's
        solution_str: str,
        ground_truth: object,  # noqa: ARG001 - veRL's
        extra_info: Mapping[str, Any] | None = None,
        **_: object,
    ) -> dict[str, float]:
        """Return the sample's score; one that cannot be scored is an error by its own name."""
        rewards = gathered([read_response(solution_str, extra_info)])
        (error,) = rewards.errors
        if error is not None:
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
        If `extra_info` holds no prompt, or one that cannot be read.
    """
    prompt = None if extra_info is None else extra_info.get("prompt")
    if prompt is None:
        raise DataError(
            "veRL sends the response alone: put each row's prompt, text or messages, into "
            "extra_info['prompt'] of the data set"
        )
    if isinstance(prompt, np.ndarray):  # messages, as parquet's reader returns lists
        prompt = prompt.tolist()
    reference = None if extra_info is None else extra_info.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise DataError(f"extra_info['reference'] must be text, not {reference!r}")
    return Sample(as_prompt(prompt), response, reference)
