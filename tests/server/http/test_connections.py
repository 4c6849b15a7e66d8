"""What one connection writes, byte for byte and turn by turn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
import pytest
import uvicorn
from hypothesis import given, strategies as st
from uvicorn.server import ServerState

from ensemble_rm.server.http.connections import DeadlineProtocol, OneWrite, with_deadline


class Recorder(asyncio.Transport):
    """A transport that keeps what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False
        self.protocol: asyncio.BaseProtocol | None = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def write_eof(self) -> None:
        self.close()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

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


# How many, and for how long ----------------------------------------------------------------------


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def opener(app: Any, **options: Any) -> Callable[[], tuple[Any, Recorder]]:
    """What opens one connection after the other to one server."""
    kind = with_deadline(10, **options)
    config = uvicorn.Config(app, http=kind, lifespan="off", log_level="error")
    config.load()
    state = ServerState()

    def connect() -> tuple[DeadlineProtocol, Recorder]:
        connection, transport = kind(config, state, {}), Recorder()
        connection.connection_made(transport)
        return connection, transport

    return connect


async def early(_: Any, __: Any, send: Any) -> None:
    """Answers before it has read the body, as a refusal does."""
    head = {"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]}
    await send(head)
    await send({"type": "http.response.body"})


@given(st.integers(1, 4), st.integers(0, 3))
def test_as_many_connections_are_served_as_may_be_and_those_go_on(most: int, over: int) -> None:
    refused: list[str] = []

    async def go() -> None:
        connect = opener(early, connections=most, refused=lambda: refused.append("one"))
        opened = [connect() for _ in range(most)]
        beyond = [connect() for _ in range(over)]
        assert len(refused) == over
        for connection, transport in opened:
            connection.data_received(ASKED)
            await turns()
            assert transport.writes[0].startswith(b"HTTP/1.1 401") and not transport.closed
        for _, transport in beyond:
            head, _, body = b"".join(transport.writes).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503") and b"connection: close" in head
            assert b"retry-after: 1" in head and b"content-length: %d" % len(body) in head
            said = json.loads(body)["error"]
            assert (said["type"], said["code"]) == ("NotReadyError", 503)
        opened[0][0].connection_lost(None)
        assert connect()[1].protocol is None and len(refused) == over

    asyncio.run(go())


def test_an_idle_connection_is_not_told_that_it_is_late() -> None:
    """Though the rest of a body came behind the answer to its request."""
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n"

    async def go() -> None:
        connection, transport = opener(early)()
        connection.data_received(head)
        await turns()
        assert transport.writes[0].startswith(b"HTTP/1.1 401")
        connection.data_received(b"bo")
        assert connection._deadline is not None  # a body that drips is no reason to wait
        connection.data_received(b"dy")
        assert connection._deadline is None
        assert connection.timeout_keep_alive_task is not None
        connection.data_received(b"GET / HT")
        assert connection._deadline is not None and connection.timeout_keep_alive_task is None
        connection.data_received(b"TP/1.1\r\nhost: x\r\n\r\n")
        await turns()
        assert connection._deadline is None and len(transport.writes) == 2
        connection.connection_lost(None)

    asyncio.run(go())


def test_a_client_that_still_sends_is_read_on_behind_the_last_answer() -> None:
    """Closed with bytes that nobody read, the connection would be reset, and its answer lost."""

    async def app(_: Any, __: Any, send: Any) -> None:
        headers = [(b"content-length", b"4"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": b"long"})

    async def go() -> bytes:
        config = uvicorn.Config(app, http=with_deadline(10), lifespan="off", log_level="error")
        config.load()
        state = ServerState()
        kind: Any = config.http_protocol_class
        loop = asyncio.get_running_loop()
        made = await loop.create_server(lambda: kind(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*made.sockets[0].getsockname())
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 30000000\r\n\r\n")
        for _ in range(30):
            writer.write(b" " * 1_000_000)
            await writer.drain()  # a reset would be raised here
        said = await reader.read()
        assert len(state.connections) == 1  # it counts until it ends
        writer.close()
        while state.connections:
            await asyncio.sleep(0.001)
        made.close()
        return said

    assert answers(asyncio.run(go()), 1) == [b"long"]


# Malformed HTTP, and a cap per address -----------------------------------------------------------


MALFORMED = [b"\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"]


@pytest.mark.parametrize("raw", MALFORMED)
def test_malformed_http_is_answered_as_json(raw: bytes) -> None:
    transport = served(raw, b"never")
    head, _, body = b"".join(transport.writes).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and b"content-type: application/json" in head
    error = json.loads(body)["error"]
    assert error["code"] == 400 and error["type"] == "BadRequestError"


class From(Recorder):
    """A connection from an address."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self.address, 1234) if name == "peername" else default


def test_one_address_cannot_take_every_connection() -> None:
    async def go() -> list[bool]:
        kind = with_deadline(10, connections=10, per_address=2)
        config = uvicorn.Config(lambda: None, http=kind, lifespan="off", log_level="error")
        config.load()
        state, refused, opened = ServerState(), [], []
        for address in ["192.0.2.1"] * 3 + ["192.0.2.2"] + ["127.0.0.1"] * 3:
            connection: Any = kind(config, state, {})
            transport = From(address)
            connection.connection_made(transport)
            refused.append(b"".join(transport.writes).startswith(b"HTTP/1.1 503 "))
            opened.append(connection)
        for connection, is_refused in zip(opened, refused, strict=True):
            if not is_refused:
                connection.connection_lost(None)
        return refused

    assert asyncio.run(go()) == [False, False, True, False, False, False, False]
