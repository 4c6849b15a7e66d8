"""uvicorn's HTTP/1.1 connections, with a deadline for headers and a maximum number.

uvicorn has no such deadline, and its own limit would refuse requests on open connections. Here, a
connection that sends nothing, or its headers byte by byte, is answered 408 and closed, and one that
does not read its response is cut off. If a client is still sending when the connection is to be
closed, its data are read for a moment more; otherwise it would see a reset instead of the response.
A response's head and body are sent in one write: a killed server has sent a short response
completely or not at all, so that a load balancer can retry on the next server.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from ensemble_rm.errors import NotReadyError, SlowRequestError
from ensemble_rm.server.failures import error_detail

_LINGER_SECONDS = 2.0
_LINGER_BYTES = 32 * 2**20


def _last_response(status: str, error: str, message: str, *headers: str) -> bytes:
    """Return an error's response, after which the connection is closed."""
    detail = error_detail(message, error, int(status[:3]))
    body = json.dumps({"error": detail}, separators=(",", ":"))
    lines = (f"HTTP/1.1 {status}", "connection: close", "content-type: application/json", *headers)
    return "\r\n".join((*lines, f"content-length: {len(body)}", "", body)).encode()


_LATE = _last_response(
    "408 Request Timeout", SlowRequestError.__name__, "headers did not arrive in time"
)
_FULL = _last_response(
    "503 Service Unavailable",
    NotReadyError.__name__,
    "too many connections; retry later, or keep one open",
    f"retry-after: {NotReadyError.retry_after}",
)


class OneWrite:
    """A transport that joins what is written in one turn of the event loop.

    Parameters
    ----------
    transport : asyncio.Transport
        The wrapped transport; other attributes are delegated to it.
    loop : asyncio.AbstractEventLoop
    end : callable
        Called once, with the transport, to close it.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        end: Callable[[asyncio.Transport], None] = lambda transport: transport.close(),
    ) -> None:
        self._transport, self._loop, self._end = transport, loop, end
        self._held: list[bytes] = []
        self._closed = False

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the transport."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send these bytes when this turn ends."""
        if data and not self._held:
            self._loop.call_soon(self._send)
        if data:
            self._held.append(data)

    def close(self) -> None:
        """Send what was written, and close."""
        self._send()
        if not self._closed:
            self._closed = True
            self._end(self._transport)

    def is_closing(self) -> bool:
        """Whether it is closed, here or by the client."""
        return self._closed or self._transport.is_closing()

    def _send(self) -> None:
        held, self._held = self._held, []
        if held:
            self._transport.write(b"".join(held))


class DeadlineProtocol(H11Protocol):
    """One connection; `with_deadline` makes the class that uvicorn takes."""

    header_seconds: float = 10.0
    most: float = math.inf
    refused: Callable[[], None] = staticmethod(lambda: None)
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first headers, or refuse the connection at the limit."""
        # Before a parser is made: a refused connection costs one write.
        if len(self.connections) >= self.most:
            transport.write(_FULL)
            # The client may still be sending; closing at once would lose the response to a reset.
            transport.set_protocol(_Lingering(transport, self.loop, lambda _: None))
            self.refused()
            return
        whole = OneWrite(transport, self.loop, self._close)
        super().connection_made(whole)  # type: ignore[arg-type]
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the deadline ends with the last header."""
        super().data_received(data)
        if self._between_requests and self._unfinished:
            # A request has begun: its headers must all arrive before the deadline.
            self._arm()
            return
        self._disarm()
        if self._between_requests and self.timeout_keep_alive_task is None:
            # These bytes were the rest of a body already responded to; it is idle again.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Go on to the next request, whose first bytes may have arrived."""
        super().on_response_complete()
        if self._between_requests and self.conn.trailing_data[0]:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadline."""
        self._disarm()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, even if its client does not read what is left to send."""
        super().timeout_keep_alive_handler()
        # A client that reads nothing keeps the transport's buffer full, and close waits for it.
        self._cut_off()

    @property
    def _between_requests(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None until the first request
        return cycle is None or cycle.response_complete

    @property
    def _unfinished(self) -> bool:
        """Whether a request has begun, or is the first."""
        begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        return begun or self.cycle is None

    def _arm(self) -> None:
        # The first deadline stays: a slow client must not extend it by each byte.
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self._late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self._between_requests and not self.transport.is_closing():
            self.transport.write(_LATE)
            self.transport.close()
            self._cut_off()

    def _close(self, transport: asyncio.Transport) -> None:
        if self.conn.their_state in (h11.SEND_BODY, h11.ERROR):
            transport.set_protocol(_Lingering(transport, self.loop, self.connection_lost))
        else:
            transport.close()

    def _cut_off(self) -> None:
        self.loop.call_later(self.header_seconds, self.transport.abort)


class _Lingering(asyncio.Protocol):
    """The end of a connection whose client may still be sending.

    Closing it with unread bytes would reset it, and the client would lose the response.

    Parameters
    ----------
    transport : asyncio.Transport
        Everything is already written to it.
    loop : asyncio.AbstractEventLoop
    lost : callable
        Called as `connection_lost` is.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        lost: Callable[[Exception | None], None],
    ) -> None:
        self._transport, self._lost, self._left = transport, lost, _LINGER_BYTES
        self._end = loop.call_later(_LINGER_SECONDS, transport.abort)
        # Half-closed: our side has ended, the client's may still arrive.
        transport.write_eof()
        transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Drop what arrives, up to a maximum."""
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._end.cancel()
        self._lost(exc)


def with_deadline(
    header_seconds: float,
    *,
    connections: float = math.inf,
    refused: Callable[[], None] = lambda: None,
) -> type[DeadlineProtocol]:
    """Return the protocol class with these limits.

    Parameters
    ----------
    header_seconds : float
        Time for a request's headers to arrive.
    connections : int or inf
        Maximum of open connections; further ones are answered 503.
    refused : callable
        Called for each connection that is refused.
    """
    limits = {"header_seconds": header_seconds, "most": connections}
    return type(
        "DeadlineProtocol", (DeadlineProtocol,), limits | {"refused": staticmethod(refused)}
    )
