"""Run the server until a signal comes, then finish accepted requests.

On SIGTERM or SIGINT, `/ready` is false at once. For `drain_seconds`, in which load balancers
notice, requests are still served. Then no more are accepted, and those that are not scored after
`stop_seconds` are answered 503. A second signal ends the draining, a third one stops the server at
once.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from ensemble_rm.errors import ServerError
from ensemble_rm.server.http.app import create_app
from ensemble_rm.server.http.auth import Token, check_bind
from ensemble_rm.server.http.connections import with_deadline
from ensemble_rm.server.options import NetworkOptions, ServerOptions

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

_BACKLOG = 2048
_ANSWERING = 2  # seconds for a client that does not read its response
_KEEP_ALIVE = 65  # seconds; longer than load balancers keep theirs, so that they close first


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops.

    Parameters
    ----------
    config : uvicorn.Config
    draining : callable
        Called when a signal comes.
    drain_seconds : float
        Time from the signal until no more requests are accepted.
    abandoning : callable
        Called `stop_seconds` later, to fail the requests that are left.
    stop_seconds : float
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        draining: Callable[[], None],
        drain_seconds: float,
        abandoning: Callable[[], None],
        stop_seconds: float,
    ) -> None:
        super().__init__(config)
        self._draining, self._drain_seconds = draining, drain_seconds
        self._abandoning, self._stop_seconds = abandoning, stop_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Start draining; a second signal ends the draining, a third one stops at once."""
        # A second Ctrl-C on a terminal means now.
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        elif self._signalled or self._loop is None:
            self.should_exit = True
        else:
            self._signalled = True
            self._draining()
            # Signal handlers run between two bytecodes, where only this call wakes the loop.
            self._loop.call_soon_threadsafe(
                self._loop.call_later, self._drain_seconds, self._stop_accepting
            )

    def _stop_accepting(self) -> None:
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for accepted requests, for `stop_seconds`."""
        over = asyncio.get_running_loop().call_later(self._stop_seconds, self._abandoning)
        try:
            await super().shutdown(sockets)
        finally:
            over.cancel()


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises
    ------
    ServerError
        If the address cannot be bound.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        # A restarted server binds although old connections are in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)  # clients can connect before uvicorn runs
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ServerError(f"{host}:{port} cannot be bound: {error}") from error
    return listener


def serve(
    load: Callable[[], RewardEnsemble],
    options: ServerOptions | None = None,
    *,
    network: NetworkOptions | None = None,
    token: Token | None = None,
    listening: Callable[[str, int], None] | None = None,
) -> bool:
    """Serve an ensemble until a signal comes.

    Parameters
    ----------
    load : callable
        Returns the ensemble; called in a thread, while the server is already listening.
    options : ServerOptions, optional
    network : NetworkOptions, optional
        Address, port and shutdown.
    token : Token, optional
        Bearer token that requests must carry; required for any host but the loopback address.
    listening : callable, optional
        Called with host and port once they are bound.

    Returns
    -------
    bool
        Whether its threads have finished as well. If not, one of them is still scoring, loading or
        waiting for a member's server, and cannot be interrupted. It is a daemon thread, which does
        not keep the process from ending; `os._exit` ends it even in native code.

    Raises
    ------
    ServerError
        If other machines reach the host and there is no token, or the address cannot be bound.
    EnsembleRMError
        If the ensemble cannot be loaded.
    """
    options, network = options or ServerOptions(), network or NetworkOptions()
    check_bind(network.host, token)
    bound = bind(network.host, network.port)
    failed: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failed.append(error)
        # uvicorn looks at this flag, since an exception in a task does not end it.
        server.should_exit = True

    app = create_app(load, options, token=token, on_failure=fail)
    service = app.state.service
    config = uvicorn.Config(
        app,
        http=with_deadline(
            options.limits.header_seconds,
            connections=options.limits.max_connections,
            refused=service.metrics.requests.labels("other", "503").inc,
        ),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=network.access_log,
        server_header=False,
        # Forwarded headers are for the proxy to check; trusting them would let a client name
        # itself.
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        # Longer than the requests' own deadline, so that they are answered, not cut.
        timeout_graceful_shutdown=math.ceil(network.stop_seconds) + _ANSWERING,
    )

    def drain() -> None:
        service.draining = True

    server = Server(
        config,
        draining=drain,
        drain_seconds=network.drain_seconds,
        abandoning=service.abandon,
        stop_seconds=network.stop_seconds,
    )
    with bound:
        if listening is not None:
            listening(*bound.getsockname()[:2])
        asyncio.run(server.serve(sockets=[bound]))
    if failed:
        raise failed[0]
    return not service.busy
