"""LLaMA-Factory's ``/v1/score/evaluation`` (0.9), which its PPO trainer calls.

Its client sends no header, has no time-out and ignores the status: it reads ``scores``, which is
missing in an error's body, so that an error is never read as a reward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

from pydantic import BaseModel, Field

from ensemble_rm.server.wire.format import Route, WireFormat
from ensemble_rm.server.wire.native import Text
from ensemble_rm.server.wire.raw_text import EXAMPLE

if TYPE_CHECKING:
    from ensemble_rm.server.service import RequestContext


class ScoreEvaluationRequest(BaseModel):
    """Texts in the policy's chat template."""

    model: str
    messages: list[Text] = Field(min_length=1, fail_fast=True)
    max_length: int | None = Field(None, description="ignored: each member has its own length")


class ScoreEvaluationAnswer(BaseModel):
    """One score per text, in their order."""

    id: str
    object: str = "score.evaluation"
    model: str
    scores: list[float]


async def evaluation(
    request: ScoreEvaluationRequest, context: RequestContext
) -> ScoreEvaluationAnswer:
    """LLaMA-Factory: scores of texts in the policy's chat template."""
    scores = await context.score(context.read_texts(request.messages))
    return ScoreEvaluationAnswer(
        id=f"scoreval-{uuid4().hex}", model=request.model, scores=scores.reward.tolist()
    )


FORMAT = WireFormat(
    "llamafactory",
    (
        Route(
            path="/v1/score/evaluation",
            handler=evaluation,
            request=ScoreEvaluationRequest,
            response=ScoreEvaluationAnswer,
            examples={"texts": {"model": "model", "messages": [EXAMPLE]}},
        ),
    ),
)
