"""LLaMA-Factory's ``/v1/score/evaluation`` (0.9), which its PPO trainer asks.

Its client sends no header, knows no time-out and does not look at the status: it reads ``scores``,
which an error's answer does not have. Pure: knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from ensemble_rm.server.scheduling.outcomes import Scored
from ensemble_rm.server.wire.native import Text


class ScoreEvaluationRequest(BaseModel):
    """Texts in the policy's template."""

    model: str
    messages: list[Text] = Field(min_length=1, fail_fast=True)
    max_length: int | None = Field(
        None, description="has no effect: each member reads its own length"
    )


class ScoreEvaluationAnswer(BaseModel):
    """One score a text, in their order."""

    id: str
    object: str = "score.evaluation"
    model: str
    scores: list[float]


def evaluation_answer(found: Sequence[Scored], *, model: str, answer_id: str) -> dict[str, Any]:
    """Return the answer to a `ScoreEvaluationRequest`, which names the model that was asked for."""
    return {
        "id": f"scoreval-{answer_id}",
        "object": "score.evaluation",
        "model": model,
        "scores": [one.reward for one in found],
    }
