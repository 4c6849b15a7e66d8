"""Between HTTP and the service: bodies within their limits, clients that leave, errors as answers.

Knows requests and statuses; knows nothing of the wire formats' shapes.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ensemble_rm.errors import (
    AggregatorMismatchError,
    BaselineError,
    DataError,
    EnsembleRMError,
    MediaTypeError,
    NotCalibratedError,
    RemoteError,
    RemoteUnavailableError,
    RequestError,
    SlowRequestError,
    TemplateError,
)
from ensemble_rm.server.http.limits import check_bytes, parse_json
from ensemble_rm.server.options import Limits
from ensemble_rm.server.scheduling.outcomes import SampleError, say_error

T = TypeVar("T")
VERSION_HEADER = "x-ensemble-version"
_GONE = 499  # nobody reads it; the figures count it
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (BaselineError, 422),
    (DataError, 422),
    (TemplateError, 422),
    (NotCalibratedError, 409),
    (AggregatorMismatchError, 409),
    (RemoteUnavailableError, 503),  # of a member that lives elsewhere: come again
    (RemoteError, 502),
)
_log = logging.getLogger(__name__)


# Bodies ----------------------------------------------------------------------------------------


async def read_json(request: Request, limits: Limits) -> Any:
    """Read a request's body within its limits, however it is sent, and parse it.

    Raises
    ------
    MediaTypeError, TooLargeError, SlowRequestError, BadRequestError
        If it is declared as no JSON or as compressed, too large, too slow, or no JSON.
    ClientDisconnect
        If the client leaves.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise MediaTypeError("send JSON, with the header Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise MediaTypeError(
            "send the body as it is, without Content-Encoding: none is undone here"
        )
    declared = request.headers.get("content-length", "")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            if declared.isdecimal():
                check_bytes(int(declared[:20]), limits)
            async for chunk in request.stream():
                body += chunk
                check_bytes(len(body), limits)
    except TimeoutError:
        raise SlowRequestError(
            f"the body did not arrive within {limits.body_seconds:g} s"
        ) from None
    return parse_json(bytes(body))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives, or give it up as soon as the client does.

    Raises
    ------
    ClientDisconnect
        If the client leaves.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Answers ---------------------------------------------------------------------------------------


def json_answer(
    said: object,
    *,
    version: str | None = None,
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> Response:
    """Return JSON, with the version that made it in a header."""
    named = {VERSION_HEADER: version} if version is not None else {}
    content = json.dumps(said, allow_nan=False, separators=(",", ":"))
    return Response(content, status, headers=named | (headers or {}), media_type="application/json")


def error_answer(error: Exception) -> Response:
    """Return an error's answer, in OpenAI's and vLLM's shape: none of the request's text."""
    status, message = 500, say_error(error)
    headers = {}
    if isinstance(error, RequestError):
        status, message = error.status, str(error)
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
        if status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not read
        if status == 401:
            headers["www-authenticate"] = "Bearer"
    elif isinstance(error, SampleError):
        cause = error.__cause__
        assert isinstance(cause, Exception)
        status, message = _status(cause), f"sample {error.place}: {say_error(cause)}"
        if isinstance(cause, RequestError):
            message = f"sample {error.place}: {cause}"
        error = cause
    else:
        status = _status(error)
    said = {"message": message, "type": type(error).__name__, "param": None, "code": status}
    return json_answer({"error": said}, status=status, headers=headers)


def _status(error: Exception) -> int:
    if isinstance(error, RequestError):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def answering(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Make every exception of a handler an answer: no reward, and no log of text."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        except Exception as error:  # noqa: BLE001 - what is unexpected is answered, too
            found = error_answer(error)
            if found.status_code >= 500 and not isinstance(error, RequestError):
                _log.error("%s answers %d: %s", request.url.path, found.status_code, _where(error))
            return found

    answer.__name__, answer.__doc__ = handler.__name__, handler.__doc__
    return answer


def _where(error: Exception) -> str:
    """Say an error's name and where it was raised; its message may quote a request."""
    cause = error.__cause__ if isinstance(error, SampleError) else error
    assert cause is not None
    trace = cause.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    kind = "" if isinstance(cause, EnsembleRMError) else "unexpected "
    return f"{kind}{type(cause).__name__}{place}"
