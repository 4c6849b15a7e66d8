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

from ensemble_rm.errors import OptionError, ServerError
from ensemble_rm.server.http.app import create_app
from ensemble_rm.server.http.auth import Token, check_bind
from ensemble_rm.server.http.connections import with_deadline
from ensemble_rm.server.service import ServerOptions

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

_BACKLOG = 2048
_LAST_PORT = 2**16 - 1
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


def _check_numbers(port: int, **seconds: float) -> None:
    """Raise `OptionError` where a number would bind another port, or let the server never end."""
    if not 0 <= port <= _LAST_PORT:
        raise OptionError(f"the port must lie between 0 and {_LAST_PORT}, not {port}")
    for name, value in seconds.items():
        if not 0 <= value < math.inf:
            raise OptionError(f"{name} must be a finite number of seconds ≥ 0, not {value:g}")


def serve(
    load: Callable[[], RewardEnsemble],
    options: ServerOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: Token | None = None,
    drain_seconds: float = 0.0,
    stop_seconds: float = 300.0,
    access_log: bool = False,
    listening: Callable[[str, int], None] | None = None,
) -> bool:
    """Serve an ensemble until a signal comes.

    Parameters
    ----------
    load : callable
        Returns the ensemble; called in a thread, while the server listens already.
    options : ServerOptions
    host, port : str, int
        What to bind; port 0 is any that is free.
    token : Token, optional
        Required for every host but this machine's own.
    drain_seconds : float
        From the signal until nothing new is accepted; `/ready` is false meanwhile.
    stop_seconds : float
        For what was accepted, from then on; what is not scored by then is answered 503.
    access_log : bool
        Whether uvicorn logs a line a request: address, path, status.
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
    OptionError
        If the port is none, or the seconds are negative, infinite or NaN.
    BindError
        If others reach the host, and there is no token.
    ServerError
        If the address cannot be bound.
    EnsembleRMError
        What loading the ensemble raised.
    """
    _check_numbers(port, drain_seconds=drain_seconds, stop_seconds=stop_seconds)
    check_bind(host, token)
    bound = bind(host, port)
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
            connections=options.limits.connections,
            refused=service.metrics.requests.labels("other", "503").inc,
        ),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(stop_seconds) + _ANSWERING,
    )

    def drain() -> None:
        service.draining = True

    server = Server(
        config,
        draining=drain,
        drain_seconds=drain_seconds,
        abandoning=service.abandon,
        stop_seconds=stop_seconds,
    )
    with bound:
        if listening is not None:
            listening(*bound.getsockname()[:2])
        asyncio.run(server.serve(sockets=[bound]))
    if failed:
        raise failed[0]
    return not service.busy
