"""What a request may cost before it is refused, and how its bytes become JSON.

Every refusal is a named error with a 4xx status whose message holds numbers and places, never the
request's own text. Knows bytes and samples; knows nothing of HTTP or of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from ensemble_rm.data.samples import Prompt, Sample
from ensemble_rm.errors import BadRequestError, TooLargeError, UnprocessableError
from ensemble_rm.server.options import Limits

_BYTES_A_TOKEN = 4
_TOKENS_A_TURN = 4  # what a template puts around it
_LISTS = 4  # of a body, as long as its samples
_SHOWN = 5  # faults of a body that a message names

M = TypeVar("M", bound=BaseModel)


def check_bytes(size: int, limits: Limits) -> None:
    """Raise `TooLargeError` where a body has more bytes."""
    if size > limits.max_body_bytes:
        raise TooLargeError(f"the body has more than {limits.max_body_bytes} bytes; send fewer")


def check_lists(body: object, limits: Limits) -> None:
    """Raise `TooLargeError` where a list of a body is longer than a request's samples."""
    values = body.values() if isinstance(body, dict) else ()
    longest = max((len(value) for value in values if isinstance(value, list)), default=0)
    if longest > limits.max_samples:
        raise TooLargeError(
            f"a list of {longest} in one request, and {limits.max_samples} at most; send several"
        )


def check_entries(body: object, limits: Limits) -> None:
    """Raise `TooLargeError` where a body's lists have more entries than its tokens allow.

    Each turn is some tokens, however short; to read a body of hundreds of thousands in shape
    would hold the event loop for seconds, only to refuse it.
    """
    most = limits.max_tokens // _TOKENS_A_TURN + _LISTS * limits.max_samples
    count, left = 0, [body]
    while left:
        value = left.pop()
        if isinstance(value, list):
            count += len(value)
            if count > most:
                raise TooLargeError(
                    f"more than {most} messages and texts in one request; send several"
                )
        elif isinstance(value, dict):
            value = value.values()
        else:
            continue
        left += [entry for entry in value if isinstance(entry, dict | list)]


def check_texts(texts: str | Sequence[str], limits: Limits) -> None:
    """Raise `TooLargeError` where a text, before it is taken apart, is longer than a sample."""
    for i, text in enumerate([texts] if isinstance(texts, str) else texts):
        if len(text) > limits.max_characters:
            raise TooLargeError(
                f"text {i} has {len(text)} characters, and may have {limits.max_characters}"
            )


def check_samples(samples: Sequence[Sample], limits: Limits) -> None:
    """Raise an error where the samples of a request are none, too many or too long.

    Raises
    ------
    UnprocessableError
        If there is no sample.
    TooLargeError
        If there are too many, or one is too long, or all of them are together.
    """
    if not samples:
        raise UnprocessableError("the request holds no sample")
    if len(samples) > limits.max_samples:
        raise TooLargeError(
            f"{len(samples)} samples in one request, and {limits.max_samples} at most; send several"
        )
    for i, sample in enumerate(samples):
        size = prompt_characters(sample.prompt) + len(sample.completion)
        size += len(sample.reference or "")
        if size > limits.max_characters:
            raise TooLargeError(
                f"sample {i} has {size} characters, and may have {limits.max_characters}"
            )
    tokens = sum(sum(estimate_tokens(sample)) for sample in samples)
    if tokens > limits.max_tokens:
        raise TooLargeError(
            f"about {tokens} tokens in one request, and {limits.max_tokens} at most; send several"
        )


def prompt_characters(prompt: Prompt) -> int:
    """Count the characters of a prompt, its roles left out."""
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def estimate_tokens(sample: Sample) -> tuple[int, int]:
    """Guess a sample's tokens, of the prompt and of the completion: a quarter of their bytes.

    For queues and limits, which must not wait for a tokenizer. Members count their own.
    """
    prompt = sample.prompt
    turns = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    asked = sum(_TOKENS_A_TURN + len(text.encode()) // _BYTES_A_TOKEN for text in turns)
    return asked, _TOKENS_A_TURN + len(sample.completion.encode()) // _BYTES_A_TOKEN


def parse_json(body: bytes) -> Any:
    """Read JSON as RFC 8259 has it.

    NaN, infinities, lone surrogates, bytes that are no UTF-8, and more than 200 levels are refused.

    Raises
    ------
    BadRequestError
        If the body is something else.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"the body is no JSON: {error}") from None


def read_model(kind: type[M], body: Any) -> M:
    """Read a request's body as one of a wire format's shapes.

    Raises
    ------
    UnprocessableError
        If it has another shape; the message names places and faults, not the values.
    """
    try:
        return kind.model_validate(body, strict=True)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        shown = "; ".join(
            _fault(fault["loc"], fault["type"], fault["msg"]) for fault in faults[:_SHOWN]
        )
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise UnprocessableError(
            f"the body does not have the shape asked for: {shown}{more}"
        ) from None


def _fault(place: tuple[int | str, ...], kind: str, what: str) -> str:
    if kind == "extra_forbidden":
        place, what = place[:-1], "a field that is not known"  # its name is the client's text
    if kind == "union_tag_invalid":
        what = "a name that is not known"  # pydantic's message quotes it
    return f"{'.'.join(map(str, place)) or 'body'}: {what}"
