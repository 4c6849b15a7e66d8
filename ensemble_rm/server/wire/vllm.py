"""vLLM's ``/classify`` (0.33), for texts and for messages.

vLLM applies a sigmoid to a single score unless ``use_activation`` is false, and so does this: the
answer is then σ(reward), in (0, 1). A client that trains on it asks for false. Fields that change
how vLLM tokenises are accepted and have no effect: members have tokenizers and templates of their
own. Pure: knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field
from scipy.special import expit

from ensemble_rm.data.samples import Message, Sample
from ensemble_rm.errors import UnprocessableError
from ensemble_rm.server.http.limits import estimate_tokens
from ensemble_rm.server.scheduling.outcomes import Scored
from ensemble_rm.server.wire.native import Text
from ensemble_rm.server.wire.raw_text import RawText

Texts = Text | Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class ClassifyText(BaseModel):
    """Texts in the policy's template."""

    input: Texts = Field(description="token ids are refused: the members' tokenizers differ")
    model: str | None = None
    use_activation: bool | None = Field(None, description="false for the reward itself; else its σ")
    add_special_tokens: bool = True


class ChatTurn(BaseModel):
    """One message."""

    role: str = Field(pattern=r"^[a-z_]{1,32}$")
    content: str


class ClassifyChat(BaseModel):
    """One conversation, whose last message is the assistant's and is scored."""

    messages: list[ChatTurn] = Field(min_length=2, fail_fast=True)
    model: str | None = None
    use_activation: bool | None = None
    add_special_tokens: bool = False


class Usage(BaseModel):
    """Tokens, as estimated; members count their own."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = 0
    prompt_tokens_details: None = None
    completion_tokens_details: None = None


class Classified(BaseModel):
    """One text's score."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassifyAnswer(BaseModel):
    """One score a text, in their order."""

    id: str
    object: str
    created: int
    model: str
    data: list[Classified]
    usage: Usage


def read_classify(
    request: ClassifyText | ClassifyChat, raw_text: RawText, names: Sequence[str]
) -> list[Sample]:
    """Return the samples of a request.

    Raises
    ------
    UnprocessableError
        If a text cannot be scored as it stands, or the last message is not the assistant's.
    """
    if isinstance(request, ClassifyText):
        return raw_text.each(request.input, names)
    *before, last = request.messages
    if last.role != "assistant":
        raise UnprocessableError("the last message must be the assistant's: it is what is scored")
    return [Sample(tuple(Message(turn.role, turn.content) for turn in before), last.content)]


def usage(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the tokens of samples, as estimated."""
    tokens = sum(sum(estimate_tokens(sample)) for sample in samples)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def classify_answer(
    found: Sequence[Scored],
    samples: Sequence[Sample],
    *,
    activation: bool | None,
    name: str,
    answer_id: str,
    created: int,
) -> dict[str, Any]:
    """Return the answer to a `ClassifyText` or a `ClassifyChat`.

    Parameters
    ----------
    found, samples : sequence
    activation : bool, optional
        As asked for; None is true, as in vLLM.
    name : str
        The model's.
    answer_id, created : str, int
        Of the answer; the Unix time in seconds.
    """
    raw = activation is False
    values = [one.reward if raw else float(expit(one.reward)) for one in found]
    return {
        "id": f"classify-{answer_id}",
        "object": "list",
        "created": created,
        "model": name,
        "data": [
            {"index": i, "label": "LABEL_0", "probs": [value], "num_classes": 1}
            for i, value in enumerate(values)
        ],
        "usage": usage(samples)
        | {"prompt_tokens_details": None, "completion_tokens_details": None},
    }
