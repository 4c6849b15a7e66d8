"""OpenRLHF's ``/get_reward``, as its ``cli/serve_rm.py`` answers (openrlhf 0.11).

The response has lists, also for one sample: the trainer makes a tensor of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, Field, JsonValue
from pydantic_core import from_json

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import NonFiniteScoreError
from ensemble_rm.rl.openrlhf import logs_spread
from ensemble_rm.server.failures import SampleError
from ensemble_rm.server.wire.format import Route, WireFormat
from ensemble_rm.server.wire.native import Text
from ensemble_rm.server.wire.raw_text import EXAMPLE, EXAMPLE_PROMPT
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.server.service import RequestContext


class OpenRLHFRequest(BaseModel):
    """Texts in the policy's chat template; `labels` may have the messages, as JSON."""

    query: list[Text] = Field(min_length=1, fail_fast=True)
    prompts: list[str] | None = Field(None, fail_fast=True)
    labels: list[JsonValue] | None = Field(None, fail_fast=True)


class OpenRLHFAnswer(BaseModel):
    """One number per query; `scores` are used for dynamic filtering."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


async def get_reward(request: OpenRLHFRequest, context: RequestContext) -> OpenRLHFAnswer:
    """OpenRLHF: rewards of texts in the policy's chat template, with messages in `labels`."""
    labels = None if request.labels is None else [read_label(label) for label in request.labels]
    samples = context.read_texts(request.query, prompts=request.prompts, labels=labels)
    scores = await context.score(samples)
    with np.errstate(over="ignore", invalid="ignore"):
        logs = {"member_mean": _finite(np.nanmean(scores.members, axis=1))}
        if logs_spread(context.ensemble):
            logs["member_std"] = _finite(member_std(scores.members, nan="omit"))
    rewards = scores.reward.tolist()
    return OpenRLHFAnswer(rewards=rewards, scores=rewards, extra_logs=logs)


def read_label(label: object) -> object:
    """Parse a label; one that is not JSON, such as the right answer, has no messages."""
    if not isinstance(label, str):
        return label
    try:
        content = from_json(label, allow_inf_nan=False)
    except ValueError:
        return None
    return None if isinstance(content, str) else content  # nested JSON text is not parsed


def _finite(values: Floats) -> list[float]:
    """Return a logged value, which the client puts into a tensor: null is not allowed.

    Raises
    ------
    SampleError
        If a value is not finite.
    """
    infinite = np.flatnonzero(~np.isfinite(values))
    if infinite.size:
        cause = NonFiniteScoreError("the members' mean or std is too large for a float")
        raise SampleError(int(infinite[0]), cause)
    logged: list[float] = values.tolist()
    return logged


FORMAT = WireFormat(
    "openrlhf",
    (
        Route(
            path="/get_reward",
            handler=get_reward,
            request=OpenRLHFRequest,
            response=OpenRLHFAnswer,
            examples={
                "messages in the label": {
                    "query": [EXAMPLE],
                    "prompts": [EXAMPLE_PROMPT],
                    "labels": ['[{"role": "user", "content": "How are you?"}]'],
                }
            },
        ),
    ),
)
