"""SGLang's ``/classify`` and ``/v1/embeddings`` (0.5), whose embedding is the raw score.

veRL reads ``data[-1].embedding[-1]``.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from pydantic import BaseModel, Field

from ensemble_rm.errors import NonFiniteScoreError
from ensemble_rm.server.failures import SampleError
from ensemble_rm.server.service import estimate_tokens
from ensemble_rm.server.wire.format import Route, WireFormat
from ensemble_rm.server.wire.raw_text import EXAMPLE
from ensemble_rm.server.wire.vllm import Texts, usage

if TYPE_CHECKING:
    from ensemble_rm.server.service import RequestContext


class SGLangText(BaseModel):
    """Texts in the policy's chat template."""

    text: Texts = Field(
        description="`input_ids` are refused, since members have tokenizers of their own"
    )


class SGLangMeta(BaseModel):
    """Metadata of a score."""

    id: str
    finish_reason: dict[str, str | int]
    prompt_tokens: int
    weight_version: str = Field(description="the ensemble's version")
    num_retractions: int = 0


class SGLangScore(BaseModel):
    """Score of one text; a list of texts gets a list of these."""

    embedding: list[float]
    meta_info: SGLangMeta


class EmbeddingsRequest(BaseModel):
    """Texts in the policy's chat template."""

    input: Texts
    model: str = "default"
    encoding_format: Literal["float", "base64"] = "float"


class Embedding(BaseModel):
    """Score of one text."""

    embedding: list[float] | str
    index: int
    object: str = "embedding"


class EmbeddingsUsage(BaseModel):
    """Estimated tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None
    reasoning_tokens: int = 0
    completion_tokens_details: None = None


class EmbeddingsAnswer(BaseModel):
    """One score per text, in their order."""

    data: list[Embedding]
    model: str
    object: str = "list"
    usage: EmbeddingsUsage


async def classify(
    request: SGLangText, context: RequestContext
) -> dict[str, Any] | list[dict[str, Any]]:
    """SGLang: an object for a single text, a list for a list."""
    samples = context.read_texts(request.text)
    scores = await context.score(samples)
    alone, answer_id = isinstance(request.text, str), uuid4().hex
    rows = [
        {
            "embedding": [reward],
            "meta_info": {
                "id": answer_id if alone else f"{answer_id}-{row}",
                "finish_reason": {"type": "length", "length": 0},
                "prompt_tokens": sum(estimate_tokens(sample)),
                "weight_version": context.version,
                "num_retractions": 0,
            },
        }
        for row, (reward, sample) in enumerate(zip(scores.reward.tolist(), samples, strict=True))
    ]
    return rows[0] if alone else rows


async def embeddings(request: EmbeddingsRequest, context: RequestContext) -> dict[str, Any]:
    """SGLang: the embedding of a text is its reward."""
    samples = context.read_texts(request.input)
    rewards = (await context.score(samples)).reward.tolist()
    packed = request.encoding_format == "base64"
    values = _pack(rewards) if packed else [[reward] for reward in rewards]
    details = {"prompt_tokens_details": None, "reasoning_tokens": 0}
    return {
        "data": [
            {"embedding": value, "index": row, "object": "embedding"}
            for row, value in enumerate(values)
        ],
        "model": context.model_name,
        "object": "list",
        "usage": usage(samples) | details | {"completion_tokens_details": None},
    }


def _pack(rewards: Sequence[float]) -> list[str]:
    """Return little-endian float32 in base64.

    Raises
    ------
    SampleError
        If a reward is too large for a float32.
    """
    packed = []
    for row, reward in enumerate(rewards):
        try:
            packed.append(b64encode(struct.pack("<f", reward)).decode())
        except OverflowError:
            cause = NonFiniteScoreError("a reward is too large for a float32")
            raise SampleError(row, cause) from cause
    return packed


FORMAT = WireFormat(
    "sglang",
    (
        Route(
            path="/classify",
            handler=classify,
            request=SGLangText,
            response=SGLangScore,
            examples={"SGLang": {"text": EXAMPLE}},
            keys=("text", "input_ids"),
            methods=("POST", "PUT"),
            listed=True,
        ),
        Route(
            path="/v1/embeddings",
            handler=embeddings,
            request=EmbeddingsRequest,
            response=EmbeddingsAnswer,
            examples={"text": {"model": "ensemble", "input": EXAMPLE}},
        ),
    ),
)
