"""What one connection writes, byte for byte and turn by turn."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from ensemble_rm.server.protocol import OneWrite, with_deadline


class Recorder(asyncio.Transport):
    """A transport that keeps what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def served(asked: bytes, body: bytes) -> Recorder:
    """What a connection that these bytes reach writes, where every answer is this body."""

    async def app(_: Any, receive: Any, send: Any) -> None:
        await receive()
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    async def go() -> Recorder:
        config = uvicorn.Config(app, http=with_deadline(10), lifespan="off", log_level="error")
        config.load()
        kind: Any = config.http_protocol_class
        connection = kind(config, ServerState(), {})
        transport = Recorder()
        connection.connection_made(transport)
        connection.data_received(asked)
        for _ in range(50):
            await asyncio.sleep(0)
        closed = transport.closed
        connection.connection_lost(None)
        transport.closed = closed
        return transport

    return asyncio.run(go())


def answers(text: bytes, n: int) -> list[bytes]:
    """The bodies of n answers, as h11 reads them."""
    reader = h11.Connection(h11.CLIENT)
    reader.receive_data(text)
    found = []
    for _ in range(n):
        reader.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        reader.send(h11.EndOfMessage())
        body = b""
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            body += bytes(event.data) if isinstance(event, h11.Data) else b""
        found.append(body)
        if n > 1:
            reader.start_next_cycle()
    return found


ASKED = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize("body", [b"", b"{}", b"x" * 200, b"y" * 300_000])
def test_an_answer_leaves_in_one_write(body: bytes) -> None:
    """A server that is killed between two writes leaves half an answer, which no balancer mends."""
    said = served(ASKED, body)
    assert len(said.writes) == 1 and not said.closed
    assert answers(said.writes[0], 1) == [body]


def test_answers_to_requests_sent_at_once_keep_their_order() -> None:
    said = served(ASKED * 3, b"abc")
    assert answers(b"".join(said.writes), 3) == [b"abc"] * 3


def test_an_answer_is_sent_before_its_connection_closes() -> None:
    said = served(ASKED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), b"last")
    assert said.closed and len(said.writes) == 1 and answers(said.writes[0], 1) == [b"last"]


@given(st.lists(st.lists(st.binary(max_size=5), max_size=4), max_size=6), st.booleans())
def test_nothing_is_lost_or_moved(turns: list[list[bytes]], close: bool) -> None:
    async def go() -> Recorder:
        transport = Recorder()
        held = OneWrite(transport, asyncio.get_running_loop())
        for i, turn in enumerate(turns):
            for data in turn:
                held.write(data)
            if not (close and i == len(turns) - 1):
                await asyncio.sleep(0)
        if close:
            held.close()
        return transport

    said = asyncio.run(go())
    assert said.writes == [b"".join(turn) for turn in turns if any(turn)]
    assert said.closed is close
