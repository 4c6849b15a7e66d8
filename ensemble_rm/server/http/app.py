"""The ASGI application: routes of the wire formats, and routes to operate the server.

A request passes from `Guard` (token, metrics) to the endpoint of its path: its body is read within
limits, validated as the wire format's request, and given to the format's handler; the result or the
error is its response. Refusals name positions and numbers, never the request's own text.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble_rm.errors import (
    BadRequestError,
    MediaTypeError,
    NotReadyError,
    RequestError,
    SlowRequestError,
    TooLargeError,
    UnauthorisedError,
    UnprocessableError,
)
from ensemble_rm.server.failures import (
    error_body,
    error_detail,
    error_headers,
    error_status,
    locate_error,
)
from ensemble_rm.server.http.auth import Token
from ensemble_rm.server.http.openapi import OPERATIONS, UNGUARDED, VERSION_HEADER, describe
from ensemble_rm.server.metrics import Metrics
from ensemble_rm.server.options import Limits, ServerOptions
from ensemble_rm.server.service import TOKENS_PER_TURN, RequestContext, RewardService
from ensemble_rm.server.wire.format import Route
from ensemble_rm.server.wire.registry import routes_by_path

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
_LISTS = 4  # per-sample lists in a body
_FAULTS_SHOWN = 5
_CLIENT_GONE = 499  # nginx's code for a client that left; only the metrics see it
_log = logging.getLogger(__name__)


def create_app(
    load: Callable[[], RewardEnsemble],
    options: ServerOptions | None = None,
    *,
    token: Token | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> Starlette:
    """Make the ASGI application that serves an ensemble.

    Parameters
    ----------
    load : callable
        Returns the ensemble; called in a thread when the application starts.
    options : ServerOptions, optional
    token : Token, optional
        Bearer token that requests must carry; an address that other machines reach needs one.
    on_failure : callable, optional
        Called with the error if the ensemble cannot be loaded. Without it, the application waits
        for the ensemble when it starts, and fails with the error.

    Returns
    -------
    Starlette
        Its `state.service` is the `RewardService`.
    """
    service = RewardService(load, options or ServerOptions())
    formats = routes_by_path()
    description = describe(formats)

    async def openapi(_: Request) -> Response:
        """Return the description of all paths."""
        return json_response(description)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service.running(on_failure):
            yield

    endpoints = {path: (_answer(service, same), same[0].methods) for path, same in formats.items()}
    operations = _operations(service) | {"/openapi.json": openapi}
    for path, operation in operations.items():
        endpoints[path] = operation, (OPERATIONS.get(path, "GET"),)
    app = Starlette(
        routes=[
            StarletteRoute(path, _answering(endpoint), methods=list(methods))
            for path, (endpoint, methods) in endpoints.items()
        ],
        middleware=[Middleware(Guard, token=token, metrics=service.metrics, paths=set(endpoints))],
        exception_handlers={HTTPException: _no_route},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


# Wire formats ------------------------------------------------------------------------------------

Endpoint = Callable[[Request], Awaitable[Response]]


def _answer(service: RewardService, routes: list[Route]) -> Endpoint:
    """Make the endpoint of a path: body → request → handler → response."""

    async def endpoint(request: Request) -> Response:
        context = RequestContext(service)
        body = await read_json(request, service.options.limits)
        route = _choose(routes, body)
        if route.list_per_sample:
            check_lists(body, service.options.limits)
        work = route.handler(read_model(route.request, body), context)
        content = await unless_gone(request, work)
        if isinstance(content, BaseModel):
            content = content.model_dump()
        return json_response(content, version=context.version)

    return endpoint


def _choose(routes: list[Route], body: object) -> Route:
    """Return the route of a body, by the keys that only its request has."""
    if len(routes) == 1:
        return routes[0]
    present = set(body) if isinstance(body, dict) else set()
    keys = [key for route in routes for key in route.keys]
    # Formats that share a path are told apart by a key that only one of them has.
    if len(present & set(keys)) != 1:
        raise UnprocessableError(f"body must have exactly one of the keys {', '.join(keys)}")
    return next(route for route in routes if present & set(route.keys))


# Bodies -------------------------------------------------------------------------------------------


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
    # A web page can send text/plain across origins without asking; JSON it cannot.
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
                # Declared too large is refused before the first byte is read.
                # A number of many digits would take long to parse.
                check_bytes(int(declared[:20]), limits)
            async for chunk in request.stream():
                body += chunk
                # Counted again: a chunked body declares no length.
                check_bytes(len(body), limits)
    except TimeoutError:
        raise SlowRequestError(f"body did not arrive within {limits.body_seconds:g} s") from None
    content = parse_json(bytes(body))
    # Lists of millions of empty entries pass the limit of bytes.
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
        # NaN and Infinity are no JSON, though Python's own parser accepts them.
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
        # Without inputs: pydantic's errors quote what the client sent.
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


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, or cancel it as soon as the client disconnects.

    Raises
    ------
    ClientDisconnect
        If the client disconnects.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        # Whatever ends first; a client that left no longer needs its samples scored.
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        # Cancelled tasks are awaited, or their exceptions are reported as never retrieved.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    most = limits.max_tokens // TOKENS_PER_TURN + _LISTS * limits.max_samples
    count, pending = 0, [body]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            count += len(value)
            if count > most:
                raise TooLargeError(
                    # Nested lists count too: messages, tools and batches may nest.
                    f"more than {most} messages and texts in one request; send several requests"
                )
        elif isinstance(value, dict):
            value = value.values()
        else:
            continue
        pending += [entry for entry in value if isinstance(entry, dict | list)]


# Operations --------------------------------------------------------------------------------------


def _operations(service: RewardService) -> dict[str, Endpoint]:
    async def refresh(_: Request) -> Response:
        version, changed = await service.refresh()
        return json_response({"version": version, "changed": changed}, version=version)

    async def models(_: Request) -> Response:
        version, name = service.served.version, service.options.name
        card = {"id": name, "object": "model", "created": service.began, "owned_by": "ensemble_rm"}
        card |= {"root": name, "parent": None, "version": version}
        return json_response({"object": "list", "data": [card]}, version=version)

    async def health(_: Request) -> Response:
        return json_response({"status": "alive"})

    async def ready(_: Request) -> Response:
        if service.draining:
            raise NotReadyError("the server is shutting down")
        version = service.served.version
        if not service.ready:
            raise NotReadyError("the server no longer scores; restart it")
        return json_response({"status": "ready", "version": version}, version=version)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    return {
        "/v1/refresh": refresh,
        "/v1/models": models,
        "/health": health,
        "/ready": ready,
        "/metrics": metrics,
    }


# Responses ---------------------------------------------------------------------------------------


def json_response(
    content: object,
    *,
    version: str | None = None,
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> Response:
    """Return a JSON response, with the version in a header; a NaN is an error."""
    named = {VERSION_HEADER: version} if version is not None else {}
    # allow_nan=False: a NaN in a response is a defect, and must not look like a reward.
    body = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers=named | (headers or {}), media_type="application/json")


def error_response(error: Exception) -> Response:
    """Return the response to a request that failed."""
    return json_response(
        error_body(error), status=error_status(error), headers=error_headers(error)
    )


def _answering(endpoint: Endpoint) -> Endpoint:
    """Turn exceptions of an endpoint into responses; logs never have a request's text."""

    async def answering(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except Exception as error:  # noqa: BLE001 - the unexpected is answered as well
            response = error_response(error)
            if response.status_code >= 500 and not isinstance(error, RequestError):
                where = locate_error(error)
                _log.error("%s answers %d: %s", request.url.path, response.status_code, where)
            return response

    return answering


async def _no_route(_: Request, error: Exception) -> Response:
    """Respond to an unknown path or method."""
    assert isinstance(error, HTTPException)
    detail = error_detail(error.detail, "HTTPError", error.status_code)
    headers = dict(error.headers or {})
    return json_response({"error": detail}, status=error.status_code, headers=headers)


# Middleware --------------------------------------------------------------------------------------


class Guard:
    """The outermost middleware: checks the token, counts and times the responses.

    Parameters
    ----------
    app : ASGI application
    token : Token, optional
        Without it, requests need no token.
    metrics : Metrics
    paths : set of str
        Paths that exist; all others are counted as one.
    """

    def __init__(
        self, app: ASGIApp, *, token: Token | None, metrics: Metrics, paths: set[str]
    ) -> None:
        self.app, self._token, self._metrics, self._paths = app, token, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = monotonic(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        # Unknown paths are one label: an attacker must not fill the registry with names.
        path = scope["path"] if scope["path"] in self._paths else "other"
        try:
            # Before the body is read.
            if self._token is not None and path not in UNGUARDED:
                self._token.check(dict(scope["headers"]).get(b"authorization"))
            await self.app(scope, receive, sending)
        except UnauthorisedError as error:
            await error_response(error)(scope, receive, sending)
        finally:
            # Also of requests that raised.
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.latency.labels(path).observe(monotonic() - began)
