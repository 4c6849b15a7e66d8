"""uvicorn's HTTP/1.1 connections, with a deadline for headers and a limit of their number.

uvicorn has no such deadline, and its own limit refuses requests of connections that are open.
A connection that sends nothing, or its headers byte by byte, is answered 408 and closed; one that
does not read its answer is cut off. A client that still sends when it is answered for the last time
is read on for a moment, since it would see a reset, and not the answer. An answer's head and body
leave in one write: a server that is killed has sent all of a short answer or nothing, and a
balancer then asks the next. Knows uvicorn; knows nothing of routes.
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

_LINGER_SECONDS = 2.0
_LINGER_BYTES = 32 * 2**20


def _last_answer(status: str, error: str, message: str, *headers: str) -> bytes:
    """Return an error's answer, in the shape of all others, behind which the connection closes."""
    said = {"message": message, "type": error, "param": None, "code": int(status[:3])}
    body = json.dumps({"error": said}, separators=(",", ":"))
    lines = (f"HTTP/1.1 {status}", "connection: close", "content-type: application/json", *headers)
    return "\r\n".join((*lines, f"content-length: {len(body)}", "", body)).encode()


_LATE = _last_answer(
    "408 Request Timeout", SlowRequestError.__name__, "the headers did not arrive in time"
)
_FULL = _last_answer(
    "503 Service Unavailable",
    NotReadyError.__name__,
    "as many connections are open as may be; come again, or keep one open",
    f"retry-after: {NotReadyError.retry_after}",
)


class OneWrite:
    """A transport that sends together what is written in one turn of the event loop.

    Parameters
    ----------
    transport : asyncio.Transport
        What is not said here is asked of it.
    loop : asyncio.AbstractEventLoop
    end : callable
        Called with the transport when it is to be closed, once.
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
        """Return what the transport itself has."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send these bytes when this turn ends."""
        if data and not self._held:
            self._loop.call_soon(self._send)
        if data:
            self._held.append(data)

    def close(self) -> None:
        """Send what is held, and close."""
        self._send()
        if not self._closed:
            self._closed = True
            self._end(self._transport)

    def is_closing(self) -> bool:
        """Whether it was closed, here or by the client."""
        return self._closed or self._transport.is_closing()

    def _send(self) -> None:
        held, self._held = self._held, []
        if held:
            self._transport.write(b"".join(held))


class DeadlineProtocol(H11Protocol):
    """One connection. `with_deadline` makes the class that uvicorn takes."""

    header_seconds: float = 10.0
    most: float = math.inf
    refused: Callable[[], None] = staticmethod(lambda: None)
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, with a deadline for the first request's headers; or refuse one too many."""
        if len(self.connections) >= self.most:
            transport.write(_FULL)
            transport.set_protocol(_Lingering(transport, self.loop, lambda _: None))
            self.refused()
            return
        whole = OneWrite(transport, self.loop, self._close)
        super().connection_made(whole)  # type: ignore[arg-type]
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Take bytes; once the headers are there, their deadline is met."""
        super().data_received(data)
        if self._between_requests and self._unfinished:
            self._arm()
            return
        self._disarm()
        if self._between_requests and self.timeout_keep_alive_task is None:
            # What came was the rest of a body that was answered already: it is idle again.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Go on to the next request, whose beginning may be there already."""
        super().on_response_complete()
        if self._between_requests and self.conn.trailing_data[0]:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._disarm()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, whether or not its client reads what is still to be sent."""
        super().timeout_keep_alive_handler()
        self._cut_off()

    @property
    def _between_requests(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle  # None until the first request
        return cycle is None or cycle.response_complete

    @property
    def _unfinished(self) -> bool:
        """Whether a request has begun, or the first is awaited."""
        begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        return begun or self.cycle is None

    def _arm(self) -> None:
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
    """The end of a connection whose client may still send: nobody reads it, and it ends soon.

    Were it closed at once, what the client sent and nobody read would reset it, answer and all.

    Parameters
    ----------
    transport : asyncio.Transport
        To which all is written.
    loop : asyncio.AbstractEventLoop
    lost : callable
        Called when the connection is no more, as `connection_lost` is.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        lost: Callable[[Exception | None], None],
    ) -> None:
        self._transport, self._lost, self._left = transport, lost, _LINGER_BYTES
        self._end = loop.call_later(_LINGER_SECONDS, transport.abort)
        transport.write_eof()
        transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Pass over what comes, within bounds."""
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._end.cancel()
        self._lost(exc)


def with_deadline(
    header_seconds: float,
    *,
    connections: float = math.inf,
    refused: Callable[[], None] = lambda: None,
) -> type[DeadlineProtocol]:
    """Return the protocol with its limits.

    Parameters
    ----------
    header_seconds : float
        From the first byte to the end of the headers.
    connections : int or inf
        Open at once; others are answered 503.
    refused : callable
        Called for each of those.
    """
    limits = {"header_seconds": header_seconds, "most": connections}
    return type(
        "DeadlineProtocol", (DeadlineProtocol,), limits | {"refused": staticmethod(refused)}
    )
