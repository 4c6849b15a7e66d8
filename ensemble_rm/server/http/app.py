"""The ASGI application: routes, description, guard and life together.

Knows FastAPI; knows nothing of wire formats, models or sockets.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ensemble_rm import __version__
from ensemble_rm.server.http.auth import Token
from ensemble_rm.server.http.bodies import answering, json_answer
from ensemble_rm.server.http.guard import Guard
from ensemble_rm.server.http.openapi import describe
from ensemble_rm.server.http.routes import Routes
from ensemble_rm.server.loading import loaded
from ensemble_rm.server.options import ServerOptions
from ensemble_rm.server.service import RewardService

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble


def create_app(
    load: Callable[[], RewardEnsemble],
    options: ServerOptions | None = None,
    *,
    token: Token | None = None,
    on_failure: Callable[[BaseException], None] | None = None,
) -> FastAPI:
    """Make the ASGI application that serves an ensemble.

    Parameters
    ----------
    load : callable
        Returns the ensemble; called in a thread when the application starts.
    options : ServerOptions, optional
    token : Token, optional
        That requests must carry; `check_bind` says where one is needed.
    on_failure : callable, optional
        Called with the error if the ensemble cannot be loaded; without it, the start waits for the
        ensemble, and fails with it.

    Returns
    -------
    FastAPI
        Its `state.service` is the `RewardService`.
    """
    service = RewardService(load, options or ServerOptions())
    routes = Routes(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with loaded(service, on_failure):
            yield

    app = FastAPI(
        title="ensemble-rm",
        version=__version__,
        summary="Rewards from an ensemble of reward models.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    paths = describe(app, routes, answering)
    app.add_exception_handler(HTTPException, _refused)
    app.add_middleware(Guard, token=token, metrics=service.metrics, paths=frozenset(paths))
    return app


async def _refused(_: Request, error: Exception) -> Response:
    """Answer what no route takes."""
    assert isinstance(error, HTTPException)
    said = {"message": error.detail, "type": "HTTPError", "param": None, "code": error.status_code}
    headers = dict(error.headers or {})
    return json_answer({"error": said}, status=error.status_code, headers=headers)
