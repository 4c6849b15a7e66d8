"""Load on a server: closed loops, open loops, and clients that misbehave. Raw HTTP/1.1 on asyncio.

A client library would cost more than the server that it measures; this knows what the benchmark
needs and no more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

LEAST = 4  # answers of a measurement
Work = tuple[str, dict[str, Any]]  # path and body


@dataclass
class Answer:
    """One answer: when it was asked for and how long it took, in seconds."""

    index: int
    asked: float
    took: float
    status: int
    said: Any


class Client:
    """One connection, kept alive."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, body: Any = None, *, method: str = "POST") -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        try:
            content = b"" if body is None else json.dumps(body).encode()
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            found = await reader.readexactly(int(headers.get("content-length", 0)))
            if headers.get("connection") == "close":
                self.close()
            return int(lines[0].split()[1]), found
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def ask_once(client: Client, index: int, work: Work) -> Answer:
    asked = perf_counter()
    status, text = await client.ask(*work)
    return Answer(index, asked, perf_counter() - asked, status, json.loads(text))


async def ask_until_answered(
    port: int, index: int, work: Work, stop: Callable[[], bool]
) -> Answer | None:
    """Ask again after refusals and lost connections, as a trainer does."""
    asked = perf_counter()
    while not stop():
        client = Client(port)
        try:
            status, text = await client.ask(*work)
            if status == 200:
                return Answer(index, asked, perf_counter() - asked, status, json.loads(text))
        except (OSError, EOFError, asyncio.IncompleteReadError):
            pass
        finally:
            client.close()
        await asyncio.sleep(0.25)
    return None


async def closed_loop(
    port: int,
    works: Sequence[Work],
    *,
    clients: int,
    seconds: float,
    warm: float,
    probe: Callable[[], float] = float,
) -> tuple[list[Answer], float, float]:
    """Let each client ask again as soon as it is answered; return the answers of the window.

    The window reaches from the last answer of the first `warm` seconds to the last answer of all:
    answers come a batch at a time, and one that is under way would be counted by half. Returned are
    the answers, the window in seconds, and by how much `probe` grew in a second of load.
    """
    next_work = iter(range(10**9))
    answers: list[Answer] = []
    began = perf_counter()

    async def run() -> None:
        client = Client(port)
        try:
            while True:
                i = next(next_work)
                answers.append(await ask_once(client, i, works[i % len(works)]))
        finally:
            client.close()

    tasks = [asyncio.ensure_future(run()) for _ in range(clients)]
    await asyncio.sleep(warm)
    first, first_at = await asyncio.to_thread(probe), perf_counter()
    until, before = perf_counter() + seconds, len(answers)
    done: set[asyncio.Future[None]] = set()
    # On a busy machine a slow side takes longer to give any figure at all.
    while not done and (perf_counter() < until or len(answers) < before + LEAST):
        done, _ = await asyncio.wait(tasks, timeout=0.2, return_when=asyncio.FIRST_EXCEPTION)
    last, last_at = await asyncio.to_thread(probe), perf_counter()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
    ends = [a.asked + a.took for a in answers]
    start = max([began, *(end for end in ends if end <= began + warm)])
    inside = [a for a, end in zip(answers, ends, strict=True) if end > start]
    assert all(a.status == 200 for a in inside), [a.said for a in inside if a.status != 200][:1]
    return inside, max(ends) - start, (last - first) / (last_at - first_at)


async def open_loop(
    port: int, works: Sequence[Work], *, rate: float, groups: int, group: int, seed: int
) -> list[Answer]:
    """Send groups at the times of a Poisson process, whether or not others were answered.

    One seed's groups come in one pattern, slower or faster with the rate.
    """
    gaps = np.random.default_rng(seed).exponential(size=groups)
    starts = np.cumsum(gaps / gaps.mean()) * group / rate
    began = perf_counter()

    async def run(at: float, index: int) -> Answer:
        await asyncio.sleep(max(began + at - perf_counter(), 0.0))
        client = Client(port)
        try:
            return await ask_once(client, index, works[index % len(works)])
        finally:
            client.close()

    asked = [run(at, i * group + j) for i, at in enumerate(starts) for j in range(group)]
    return [a for a in await asyncio.gather(*asked) if a.status == 200]


# Clients that misbehave --------------------------------------------------------------------------


@dataclass
class Nuisance:
    """Half of them send headers and no body, half leave while their answer is made."""

    port: int
    works: Sequence[Work]
    every: float
    sent: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, until: Callable[[], bool]) -> None:
        while not until():
            work = self._slow() if self.sent % 2 else self._leave(self.works[self.sent % 16])
            task = asyncio.ensure_future(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self.sent += 1
            await asyncio.sleep(self.every)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _slow(self) -> None:
        with suppress(OSError, EOFError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(b"POST /v1/score HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n")
                with suppress(TimeoutError):
                    async with asyncio.timeout(40):
                        await reader.read()
            finally:  # at the end of a run it is cancelled
                writer.close()

    async def _leave(self, work: Work) -> None:
        client = Client(self.port)
        with suppress(OSError, EOFError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(0.3):
                await client.ask(*work)
        client.close()
