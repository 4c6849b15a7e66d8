"""A request's bytes → a checked body and checked samples, within the limits.

Every refusal is a named error with a 4xx status. Its message has numbers and positions, never the
request's own text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from ensemble_rm.data.samples import Prompt, Sample
from ensemble_rm.errors import (
    BadRequestError,
    MediaTypeError,
    SlowRequestError,
    TooLargeError,
    UnprocessableError,
)
from ensemble_rm.server.options import Limits

_BYTES_PER_TOKEN = 4
_TOKENS_PER_TURN = 4  # what a chat template puts around a turn
_LISTS = 4  # lists in a body that are as long as its samples
_FAULTS_SHOWN = 5

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


# Bytes to JSON -----------------------------------------------------------------------------------


async def read_json(request: Request, limits: Limits) -> Any:
    """Read and parse the body of a request.

    Raises
    ------
    MediaTypeError
        If it is not declared as JSON, or declared as compressed.
    TooLargeError, SlowRequestError
        If it exceeds `max_body_bytes`, or does not arrive within `body_seconds`.
    BadRequestError
        If it is not valid JSON, or has more entries than `max_tokens` allows.
    ClientDisconnect
        If the client disconnects.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise MediaTypeError("body is not declared as JSON; send Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise MediaTypeError(
            "compressed bodies are not supported; send it without Content-Encoding"
        )
    declared = request.headers.get("content-length", "")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            if declared.isdecimal():
                # A number of many digits would take long to parse.
                check_bytes(int(declared[:20]), limits)
            async for chunk in request.stream():
                body += chunk
                check_bytes(len(body), limits)
    except TimeoutError:
        raise SlowRequestError(f"body did not arrive within {limits.body_seconds:g} s") from None
    content = parse_json(bytes(body))
    check_entries(content, limits)
    return content


def parse_json(body: bytes) -> Any:
    """Parse JSON as RFC 8259 defines it.

    NaN, infinities, lone surrogates, bytes that are not UTF-8, and more than 200 levels of nesting
    are refused.

    Raises
    ------
    BadRequestError
        If the body is something else.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequestError(f"body is not valid JSON: {error}") from None


def read_model(kind: type[M], body: Any) -> M:
    """Validate a body as a wire format's request.

    Raises
    ------
    UnprocessableError
        If it has another shape; the message names positions and faults, not the values.
    """
    try:
        return kind.model_validate(body, strict=True)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        shown = "; ".join(
            _describe_fault(fault["loc"], fault["type"], fault["msg"])
            for fault in faults[:_FAULTS_SHOWN]
        )
        more = f"; and {len(faults) - _FAULTS_SHOWN} more" if len(faults) > _FAULTS_SHOWN else ""
        raise UnprocessableError(f"body does not have the expected shape: {shown}{more}") from None


def _describe_fault(location: tuple[int | str, ...], kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        # The name of an unknown field is the client's own text.
        location, message = location[:-1], "unknown field"
    if kind == "union_tag_invalid":
        message = "unknown name"  # pydantic's message quotes it
    return f"{'.'.join(map(str, location)) or 'body'}: {message}"


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it as soon as the client disconnects.

    Raises
    ------
    ClientDisconnect
        If the client disconnects.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Limits ------------------------------------------------------------------------------------------


def check_bytes(size: int, limits: Limits) -> None:
    """Raise `TooLargeError` if a body has too many bytes."""
    if size > limits.max_body_bytes:
        raise TooLargeError(f"body has more than {limits.max_body_bytes} bytes")


def check_lists(body: object, limits: Limits) -> None:
    """Raise `TooLargeError` if a list of a body is longer than a request's maximum of samples."""
    values = body.values() if isinstance(body, dict) else ()
    longest = max((len(value) for value in values if isinstance(value, list)), default=0)
    if longest > limits.max_samples:
        raise TooLargeError(
            f"list of {longest} samples, maximum {limits.max_samples}; send several requests"
        )


def check_entries(body: object, limits: Limits) -> None:
    """Raise `TooLargeError` if a body's lists have more entries than its tokens allow.

    Each turn has some tokens, however short. To validate a body of hundreds of thousands of turns
    would block the event loop for seconds, only to refuse it.
    """
    most = limits.max_tokens // _TOKENS_PER_TURN + _LISTS * limits.max_samples
    count, pending = 0, [body]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            count += len(value)
            if count > most:
                raise TooLargeError(
                    f"more than {most} messages and texts in one request; send several requests"
                )
        elif isinstance(value, dict):
            value = value.values()
        else:
            continue
        pending += [entry for entry in value if isinstance(entry, dict | list)]


def check_texts(texts: str | Sequence[str], limits: Limits) -> None:
    """Raise `TooLargeError` if a text that is not split yet is longer than a sample may be."""
    for i, text in enumerate([texts] if isinstance(texts, str) else texts):
        if len(text) > limits.max_characters:
            raise TooLargeError(
                f"text {i} has {len(text)} characters, maximum {limits.max_characters}"
            )


def check_samples(samples: Sequence[Sample], limits: Limits) -> None:
    """Check the number and the length of a request's samples.

    Raises
    ------
    UnprocessableError
        If there is no sample.
    TooLargeError
        If there are too many, or one of them or all together are too long.
    """
    if not samples:
        raise UnprocessableError("request has no samples")
    if len(samples) > limits.max_samples:
        raise TooLargeError(
            f"{len(samples)} samples in one request, maximum {limits.max_samples}; send several "
            "requests"
        )
    for i, sample in enumerate(samples):
        size = _prompt_characters(sample.prompt) + len(sample.completion)
        size += len(sample.reference or "")
        if size > limits.max_characters:
            raise TooLargeError(
                f"sample {i} has {size} characters, maximum {limits.max_characters}"
            )
    tokens = sum(sum(estimate_tokens(sample)) for sample in samples)
    if tokens > limits.max_tokens:
        raise TooLargeError(
            f"about {tokens} tokens in one request, maximum {limits.max_tokens}; send several "
            "requests"
        )


def _prompt_characters(prompt: Prompt) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def estimate_tokens(sample: Sample) -> tuple[int, int]:
    """Estimate the tokens of a sample's prompt and of its completion: a quarter of the bytes.

    For queues and limits, which must not wait for a tokenizer; members count their own.
    """
    prompt = sample.prompt
    turns = [prompt] if isinstance(prompt, str) else [turn.content for turn in prompt]
    shared = sum(_TOKENS_PER_TURN + len(text.encode()) // _BYTES_PER_TOKEN for text in turns)
    return shared, _TOKENS_PER_TURN + len(sample.completion.encode()) // _BYTES_PER_TOKEN
