"""uvicorn's HTTP/1.1 connections, with a deadline for headers: it has none of its own.

A connection that sends nothing, or its headers byte by byte, is answered 408 and closed; one that
does not read its answer is cut off. An answer's head and body leave in one write: a server that is
killed has sent all of a short answer or nothing, and a balancer then asks the next. Knows uvicorn;
knows nothing of routes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s"
)
_SAID = (
    b'{"error":{"message":"the headers did not arrive in time","type":"SlowRequestError",'
    b'"param":null,"code":408}}'
)


class OneWrite:
    """A transport that sends together what is written in one turn of the event loop.

    Parameters
    ----------
    transport : asyncio.Transport
        What is not said here is asked of it.
    loop : asyncio.AbstractEventLoop
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes] = []

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
        self._transport.close()

    def _send(self) -> None:
        held, self._held = self._held, []
        if held:
            self._transport.write(b"".join(held))


class DeadlineProtocol(H11Protocol):
    """One connection. `with_deadline` makes the class that uvicorn takes."""

    header_seconds: float = 10.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, with a deadline for the first request's headers."""
        super().connection_made(OneWrite(transport, self.loop))  # type: ignore[arg-type]
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Take bytes; once the headers are there, their deadline is met."""
        super().data_received(data)
        if self._between_requests:
            self._arm()
        else:
            self._disarm()

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
            self.transport.write(_LATE % (len(_SAID), _SAID))
            self.transport.close()
            self._cut_off()

    def _cut_off(self) -> None:
        self.loop.call_later(self.header_seconds, self.transport.abort)


def with_deadline(header_seconds: float) -> type[DeadlineProtocol]:
    """Return the protocol with a deadline of that many seconds."""
    return type("DeadlineProtocol", (DeadlineProtocol,), {"header_seconds": header_seconds})
