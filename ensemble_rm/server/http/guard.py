"""The outermost layer: who may ask, how long it took, and what was answered.

Plain ASGI. Knows paths and statuses; knows nothing of bodies.
"""

from __future__ import annotations

from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemble_rm.errors import UnauthorisedError
from ensemble_rm.server.http.auth import Token
from ensemble_rm.server.http.bodies import error_answer
from ensemble_rm.server.metrics import Metrics

OPEN = frozenset({"/health", "/ready"})
"""What load balancers ask for without a token."""


class Guard:
    """Ask for the token and count answers around an application.

    Parameters
    ----------
    app : ASGI application
    token : Token, optional
        Without it everybody may ask.
    metrics : Metrics
    paths : set of str
        Those that exist; others are counted together.
    """

    def __init__(
        self, app: ASGIApp, *, token: Token | None, metrics: Metrics, paths: frozenset[str]
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
            if self._token is not None and path not in OPEN:
                self._token.check(dict(scope["headers"]).get(b"authorization"))
            await self.app(scope, receive, sending)
        except UnauthorisedError as error:
            await error_answer(error)(scope, receive, sending)
        finally:
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.latency.labels(path).observe(monotonic() - began)
