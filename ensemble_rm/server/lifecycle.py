"""Run the server until it is told to stop, and then let it finish what it accepted.

On SIGTERM or SIGINT `/ready` turns false at once; after `drain_seconds`, in which load balancers
take notice and requests are still served, nothing new is accepted, and the rest is answered: with
scores, or after `stop_seconds` with a refusal. A second signal ends it sooner. Knows uvicorn and
signals; knows nothing of scores.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Callable
from time import monotonic
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
_ANSWERING = 2  # seconds, of a client that does not read
_KEEP_ALIVE = 65  # seconds; longer than balancers keep theirs, so that they close first


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it stops.

    Parameters
    ----------
    config : uvicorn.Config
    draining : callable
        Called when a signal comes.
    drain_seconds : float
        From the signal until nothing new is accepted.
    abandoning : callable
        Called when what was accepted has had its time.
    stop_seconds : float
        From then on until that.
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
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Begin to drain; the second signal stops accepting, a third waits for nothing."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        elif self._stop_at is not None:
            self.should_exit = True
        else:
            self._draining()
            self._stop_at = monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Stop when the drain is over."""
        if self._stop_at is not None and monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what was accepted finish, for its time."""
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
    found: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)  # whoever is told of the address can connect
    except OSError as error:
        if found is not None:
            found.close()
        raise ServerError(f"{host}:{port} cannot be bound: {error}") from error
    return found


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
        Returns the ensemble; called in a thread, while the server listens already.
    options : ServerOptions, optional
    network : NetworkOptions, optional
        Address, port and shutdown.
    token : Token, optional
        Required for every host but this machine's own.
    listening : callable, optional
        Called with the address once it is bound.

    Returns
    -------
    bool
        Whether its threads have finished, too. Where not, one of them still scores or loads, or
        waits for a member's server, and cannot be interrupted: a daemon thread, which keeps no
        process from ending; `os._exit` ends it in whatever native code it is.

    Raises
    ------
    ServerError
        If others reach the host, and there is no token.
        If the address cannot be bound.
    EnsembleRMError
        What loading the ensemble raised.
    """
    options, network = options or ServerOptions(), network or NetworkOptions()
    check_bind(network.host, token)
    bound = bind(network.host, network.port)
    failed: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failed.append(error)
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
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
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
