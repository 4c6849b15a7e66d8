"""The ASGI application: a route for each wire format, and routes for those who operate the server.

Plain Starlette: bodies are read within limits before they are validated, and errors are answered in
one shape, so that a framework's own reading of bodies would be in the way.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble_rm.errors import NotReadyError, RequestError, UnauthorisedError, UnprocessableError
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
from ensemble_rm.server.options import ServerOptions
from ensemble_rm.server.requests import check_lists, read_json, read_model, unless_gone
from ensemble_rm.server.service import RequestContext, RewardService
from ensemble_rm.server.wire.format import Route
from ensemble_rm.server.wire.registry import routes_by_path

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

_CLIENT_GONE = 499  # nginx's code; no client reads it, the metrics count it
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
        content = await unless_gone(request, _awaited(work))
        if isinstance(content, BaseModel):
            content = content.model_dump()
        return json_response(content, version=context.version)

    return endpoint


async def _awaited(work: Awaitable[object]) -> object:
    return await work


def _choose(routes: list[Route], body: object) -> Route:
    """Return the route of a body, by the keys that only its request has."""
    if len(routes) == 1:
        return routes[0]
    present = set(body) if isinstance(body, dict) else set()
    keys = [key for route in routes for key in route.keys]
    if len(present & set(keys)) != 1:
        raise UnprocessableError(f"body must have exactly one of the keys {', '.join(keys)}")
    return next(route for route in routes if present & set(route.keys))


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
    """Return JSON, with the version that made it in a header; a NaN is an error."""
    named = {VERSION_HEADER: version} if version is not None else {}
    body = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return Response(body, status, headers=named | (headers or {}), media_type="application/json")


def error_response(error: Exception) -> Response:
    """Return the answer to a request that failed."""
    return json_response(
        error_body(error), status=error_status(error), headers=error_headers(error)
    )


def _answering(endpoint: Endpoint) -> Endpoint:
    """Answer every exception of an endpoint; the log names it, without a request's text."""

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
    """Answer an unknown path or method."""
    assert isinstance(error, HTTPException)
    detail = error_detail(error.detail, "HTTPError", error.status_code)
    headers = dict(error.headers or {})
    return json_response({"error": detail}, status=error.status_code, headers=headers)


# Middleware --------------------------------------------------------------------------------------


class Guard:
    """The outermost layer: ask for the token, count and time the responses.

    Parameters
    ----------
    app : ASGI application
    token : Token, optional
        Without it, no token is asked for.
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

        path = scope["path"] if scope["path"] in self._paths else "other"
        try:
            if self._token is not None and path not in UNGUARDED:
                self._token.check(dict(scope["headers"]).get(b"authorization"))
            await self.app(scope, receive, sending)
        except UnauthorisedError as error:
            await error_response(error)(scope, receive, sending)
        finally:
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.latency.labels(path).observe(monotonic() - began)
