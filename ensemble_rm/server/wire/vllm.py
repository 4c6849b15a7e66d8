"""vLLM's ``/classify`` (0.33), for texts and for messages.

As in vLLM, a single score goes through a sigmoid unless ``use_activation`` is false: the response
is σ(reward), in (0, 1). A client that trains on rewards must send false. ``activation`` and
``softmax``, its names in older versions of vLLM, mean the same. Fields that change how
vLLM tokenises are accepted and ignored: members have tokenizers and templates of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any
from uuid import uuid4

from pydantic import BaseModel, Field
from scipy.special import expit

from ensemble_rm.data.samples import Message, Sample
from ensemble_rm.errors import UnprocessableError
from ensemble_rm.server.service import estimate_tokens
from ensemble_rm.server.wire.format import Route, WireFormat
from ensemble_rm.server.wire.native import Text
from ensemble_rm.server.wire.raw_text import EXAMPLE

if TYPE_CHECKING:
    from ensemble_rm.server.service import RequestContext

Texts = Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class Activation(BaseModel):
    """Whether a score goes through a sigmoid, by vLLM's present name and its two older ones."""

    use_activation: bool | None = Field(
        None, description="false for the reward itself (default: its sigmoid)"
    )
    activation: bool | None = Field(None, description="older name of use_activation")
    softmax: bool | None = Field(None, description="older name of use_activation")

    @property
    def wants_sigmoid(self) -> bool:
        """Whether the response is σ(reward).

        Raises
        ------
        UnprocessableError
            If the names contradict each other.
        """
        given = {self.use_activation, self.activation, self.softmax} - {None}
        # A silent choice between the two would train a client on the wrong scale.
        if len(given) > 1:
            raise UnprocessableError(
                "use_activation, activation and softmax are one setting and contradict each "
                "other; send use_activation alone"
            )
        return False not in given


class ClassifyText(Activation):
    """Texts in the policy's chat template."""

    input: Texts = Field(
        description="token ids are refused, since members have tokenizers of their own"
    )
    model: str | None = None
    add_special_tokens: bool = True


class ChatTurn(BaseModel):
    """One message."""

    role: str = Field(pattern=r"^[a-z_]{1,32}$")
    content: str


class ClassifyChat(Activation):
    """One conversation, whose last message is by the assistant and is scored."""

    messages: list[ChatTurn] = Field(min_length=2, fail_fast=True)
    model: str | None = None
    add_special_tokens: bool = False


class Usage(BaseModel):
    """Estimated tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = 0
    prompt_tokens_details: None = None
    completion_tokens_details: None = None


class Classified(BaseModel):
    """Score of one text."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassifyAnswer(BaseModel):
    """One score per text, in their order."""

    id: str
    object: str
    created: int
    model: str
    data: list[Classified]
    usage: Usage


async def classify_text(request: ClassifyText, context: RequestContext) -> dict[str, Any]:
    """Classify texts in the policy's chat template, as vLLM does."""
    return await _classify(context.read_texts(request.input), request, context)


async def classify_chat(request: ClassifyChat, context: RequestContext) -> dict[str, Any]:
    """Classify a conversation, as vLLM does."""
    *before, last = request.messages
    if last.role != "assistant":
        raise UnprocessableError("the last message is scored and must have the role 'assistant'")
    prompt = tuple(Message(turn.role, turn.content) for turn in before)
    return await _classify([Sample(prompt, last.content)], request, context)


async def _classify(
    samples: list[Sample], request: ClassifyText | ClassifyChat, context: RequestContext
) -> dict[str, Any]:
    sigmoid = request.wants_sigmoid  # before scoring: a contradiction costs nothing
    reward = (await context.score(samples)).reward
    values = expit(reward) if sigmoid else reward
    return {
        "id": f"classify-{uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": context.model_name,
        "data": [
            {"index": row, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for row, value in enumerate(values.tolist())
        ],
        "usage": usage(samples)
        | {"prompt_tokens_details": None, "completion_tokens_details": None},
    }


def usage(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the estimated tokens of samples."""
    tokens = sum(sum(estimate_tokens(sample)) for sample in samples)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


FORMAT = WireFormat(
    "vllm",
    (
        Route(
            path="/classify",
            handler=classify_text,
            request=ClassifyText,
            response=ClassifyAnswer,
            examples={"vLLM, text": {"input": [EXAMPLE], "use_activation": False}},
            keys=("input",),
            methods=("POST", "PUT"),
        ),
        Route(
            path="/classify",
            handler=classify_chat,
            request=ClassifyChat,
            response=ClassifyAnswer,
            examples={
                "vLLM, messages": {
                    "messages": [
                        {"role": "user", "content": "How are you?"},
                        {"role": "assistant", "content": "Fine."},
                    ],
                    "use_activation": False,
                }
            },
            keys=("messages",),
            methods=("POST", "PUT"),
            list_per_sample=False,  # its list has the turns of one sample
        ),
    ),
)
