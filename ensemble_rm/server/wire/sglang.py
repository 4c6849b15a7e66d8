"""SGLang's ``/classify`` and ``/v1/embeddings`` (0.5), whose embeddings are the raw score.

veRL reads ``data[-1].embedding[-1]``. Pure: knows nothing of HTTP.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import NonFiniteScoreError
from ensemble_rm.server.http.limits import estimate_tokens
from ensemble_rm.server.scheduling.outcomes import SampleError, Scored
from ensemble_rm.server.wire.vllm import Texts, usage


class SGLangText(BaseModel):
    """Texts in the policy's template."""

    text: Texts = Field(description="input_ids are refused: the members' tokenizers differ")


class SGLangMeta(BaseModel):
    """What SGLang says beside a score."""

    id: str
    finish_reason: dict[str, str | int]
    prompt_tokens: int
    weight_version: str = Field(description="the ensemble's version")
    num_retractions: int = 0


class SGLangScore(BaseModel):
    """One text's score: one object for one text, a list of them for a list."""

    embedding: list[float]
    meta_info: SGLangMeta


class EmbeddingsRequest(BaseModel):
    """Texts in the policy's template."""

    input: Texts
    model: str = "default"
    encoding_format: Literal["float", "base64"] = "float"


class Embedding(BaseModel):
    """One text's score."""

    embedding: list[float] | str
    index: int
    object: str = "embedding"


class EmbeddingsUsage(BaseModel):
    """Tokens, as estimated."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None
    reasoning_tokens: int = 0
    completion_tokens_details: None = None


class EmbeddingsAnswer(BaseModel):
    """One score a text, in their order."""

    data: list[Embedding]
    model: str
    object: str = "list"
    usage: EmbeddingsUsage


def sglang_answer(
    found: Sequence[Scored], samples: Sequence[Sample], *, alone: bool, version: str, answer_id: str
) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the answer to an `SGLangText`: an object for one text that came alone, else a list."""
    rows = [
        {
            "embedding": [one.reward],
            "meta_info": {
                "id": answer_id if alone else f"{answer_id}-{i}",
                "finish_reason": {"type": "length", "length": 0},
                "prompt_tokens": sum(estimate_tokens(sample)),
                "weight_version": version,
                "num_retractions": 0,
            },
        }
        for i, (one, sample) in enumerate(zip(found, samples, strict=True))
    ]
    return rows[0] if alone else rows


def embeddings_answer(
    found: Sequence[Scored], samples: Sequence[Sample], *, encoding: str, name: str
) -> dict[str, Any]:
    """Return the answer to an `EmbeddingsRequest`; base64 holds little-endian float32.

    Raises
    ------
    SampleError
        If a reward is beyond a float32, and base64 is asked for.
    """
    values: list[Any] = [[one.reward] for one in found]
    beside = {"prompt_tokens_details": None, "reasoning_tokens": 0}
    if encoding == "base64":
        values = [_packed(i, one.reward) for i, one in enumerate(found)]
    return {
        "data": [
            {"embedding": value, "index": i, "object": "embedding"}
            for i, value in enumerate(values)
        ],
        "model": name,
        "object": "list",
        "usage": usage(samples) | beside | {"completion_tokens_details": None},
    }


def _packed(place: int, reward: float) -> str:
    try:
        return b64encode(struct.pack("<f", reward)).decode()
    except OverflowError:
        cause = NonFiniteScoreError("a reward is beyond a float32")
        raise SampleError(place, cause) from cause
