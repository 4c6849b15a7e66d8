"""Tries, pauses and the circuit, under a clock of their own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from hypothesis import given, settings, strategies as st

from ensemble_rm.errors import (
    OptionError,
    RemoteAnswerError,
    RemoteRefusalError,
    RemoteUnavailableError,
)
from ensemble_rm.members import ClientOptions
from ensemble_rm.members.remote.client import RejectedError, RemoteClient
from ensemble_rm.members.remote.retries import Outcome, outcome_of, pause, retry_after

URL = "http://server.test/score"
Step = int | Exception | tuple[int, dict[str, str]]


class World:
    """A clock that only sleeping moves, and a server that follows a script."""

    def __init__(self, script: list[Step], *, took: float = 0.0, **options: Any) -> None:
        self.now, self.script, self.took = 0.0, list(script), took
        self.slept: list[float] = []
        self.calls = 0
        self.client = RemoteClient(
            ClientOptions(**({"seed": 0} | options)),
            transport=httpx.MockTransport(self.handle),
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.calls += 1
        self.now += self.took
        step = self.script.pop(0) if self.script else 200
        if isinstance(step, Exception):
            raise step
        status, headers = step if isinstance(step, tuple) else (step, {})
        return httpx.Response(status, headers=headers, json={"call": self.calls})

    def post(self) -> Any:
        return self.run(self.client.post(URL, {"x": 1}))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        async def once() -> Any:
            try:
                return await coroutine
            finally:
                await self.client.aclose()

        return asyncio.run(once())


AWAY: list[Step] = [httpx.ConnectError("refused"), httpx.ReadError("reset"), 502, 503, 504]
AWAY.append(httpx.RemoteProtocolError("Server disconnected"))


@pytest.mark.parametrize("step", [*AWAY, 429, 500, 408, 424], ids=repr)
def test_what_may_pass_is_tried_again(step: Step) -> None:
    world = World([step, step])
    assert world.post() == {"call": 3}
    assert len(world.slept) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_rejected_is_not(status: int) -> None:
    world = World([status])
    with pytest.raises(RejectedError, match=str(status)):
        world.post()
    assert world.calls == 1 and world.client.breaker.state == "closed"


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_refuses_everything_is_an_error_at_once(status: int) -> None:
    world = World([status])
    with pytest.raises(RemoteRefusalError, match=str(status)):
        world.post()
    assert world.calls == 1


def test_errors_inside_the_server_are_tried_a_stated_number_of_times() -> None:
    world = World([500] * 9, attempts=4)
    with pytest.raises(RejectedError, match="500"):
        world.post()
    assert world.calls == 4


@given(steps=st.lists(st.sampled_from(AWAY), max_size=30), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_an_outage_that_ends_in_time_costs_nothing(steps: list[Step], seed: int) -> None:
    """However many tries fail, and however the circuit opens, the answer comes, once."""
    world = World(steps, seed=seed, deadline=1e4, open_after=3, reset_after=2.0)
    assert world.post() == {"call": len(steps) + 1}
    assert world.client.breaker.state == "closed"


@given(deadline=st.floats(0.5, 100), seed=st.integers(0, 99), took=st.floats(0, 1))
@settings(max_examples=30)
def test_no_request_outlives_its_deadline(deadline: float, seed: int, took: float) -> None:
    steps: list[Step] = [503] * 10_000
    world = World(steps, seed=seed, deadline=deadline, took=took, timeout=1.0)
    with pytest.raises(RemoteUnavailableError, match="503"):
        world.post()
    assert world.now <= deadline + took


@given(
    deadline=st.floats(1, 300),
    part=st.floats(0.01, 0.9),
    seed=st.integers(0, 99),
    open_after=st.integers(1, 20),
)
@settings(max_examples=60)
def test_a_server_that_is_back_before_the_deadline_costs_nothing(
    deadline: float, part: float, seed: int, open_after: int
) -> None:
    """Neither a pause nor the circuit outlasts what is left; and there is time for the answer."""
    world = World([], seed=seed, deadline=deadline, open_after=open_after)
    back = part * deadline

    def handle(request: httpx.Request) -> httpx.Response:
        if world.now < back:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"at": world.now})

    world.client._transport = httpx.MockTransport(handle)
    assert world.post()["at"] <= deadline - (deadline - back) / 16 + 1e-9


def test_deadlines_of_those_who_wait_for_a_place_do_not_add_up() -> None:
    """A server that answers nobody is waited for once."""
    world = World([503] * 1000, concurrency=1, deadline=10.0, open_after=1000)

    async def many() -> list[Any]:
        asked = (world.client.post(URL, {}) for _ in range(6))
        return await asyncio.gather(*asked, return_exceptions=True)

    assert all(isinstance(found, RemoteUnavailableError) for found in world.run(many()))
    assert world.now < 2 * 10.0


def test_a_long_row_at_a_server_that_answers_costs_nothing() -> None:
    world = World([], concurrency=1, deadline=10.0, took=6.0)

    async def many() -> list[Any]:
        return await asyncio.gather(*(world.client.post(URL, {}) for _ in range(6)))

    assert [found["call"] for found in world.run(many())] == [1, 2, 3, 4, 5, 6]


def test_retry_after_is_honoured() -> None:
    world = World([(429, {"Retry-After": "7"}), (503, {"Retry-After": "3"})], backoff=1e-6)
    assert world.post() == {"call": 3}
    assert [round(seconds) for seconds in world.slept] == [7, 3]


def test_a_retry_after_beyond_the_deadline_ends_the_request_at_once() -> None:
    world = World([(429, {"Retry-After": "9999"})])
    with pytest.raises(RemoteUnavailableError, match="429"):
        world.post()
    assert world.slept == []


@given(st.text(max_size=20) | st.floats().map(str) | st.integers().map(str))
def test_no_header_breaks_the_pause(value: str) -> None:
    assert 0 <= retry_after(value) < float("inf")


def test_retry_after_reads_dates() -> None:
    now = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)
    assert retry_after("Wed, 25 Nov 2026 12:00:30 GMT", now=now) == 30
    assert retry_after("Wed, 25 Nov 2026 11:00:00 GMT", now=now) == 0


@given(attempt=st.integers(0, 500), seed=st.integers())
def test_full_jitter_lies_below_the_doubling_ceiling(attempt: int, seed: int) -> None:
    found = pause(attempt, backoff=0.5, max_backoff=8.0, generator=random.Random(seed))
    assert 0 <= found <= min(8.0, 0.5 * 2.0 ** min(attempt, 60))


def test_the_pauses_follow_the_seed() -> None:
    first, again, other = (World([503] * 5, seed=s) for s in (1, 1, 2))
    for world in (first, again, other):
        world.post()
    assert first.slept == again.slept != other.slept


@given(st.integers(100, 599))
def test_every_status_has_an_outcome(status: int) -> None:
    assert (outcome_of(status) is Outcome.DONE) == (200 <= status < 300)


# The circuit -------------------------------------------------------------------------------------


def test_an_open_circuit_asks_nobody_and_then_one() -> None:
    """Eight requests at a dead server: three tries open the circuit, then one probe a cool-down."""
    world = World([503] * 6, open_after=3, reset_after=2.0, backoff=1e-6, deadline=1e3)

    async def many() -> list[Any]:
        return await asyncio.gather(*(world.client.post(URL, {}) for _ in range(8)))

    found = world.run(many())
    assert len(found) == 8 and len({answer["call"] for answer in found}) == 8
    # At most all eight were under way when the circuit opened; what failed is six in all.
    assert world.calls == 8 + 6


@given(seed=st.integers(0, 99), open_after=st.integers(1, 3))
@settings(max_examples=30)
def test_a_circuit_that_stays_open_beyond_the_deadline_is_tried_in_time(
    seed: int, open_after: int
) -> None:
    """What we chose to wait never outlasts the deadline: there is always another try before it."""
    options = {"open_after": open_after, "reset_after": 50.0, "deadline": 10.0, "seed": seed}
    world = World([503] * 1000, **options)
    with pytest.raises(RemoteUnavailableError, match="503"):
        world.post()
    assert world.calls > open_after and world.now > 0.99 * 10.0


def test_poisoned_requests_do_not_open_the_circuit() -> None:
    """However many there are: the model cannot take them, and takes all others."""
    world = World([500] * 80, attempts=4, open_after=3)

    async def many() -> list[Any]:
        asked = (world.client.post(URL, {}) for _ in range(20))
        return await asyncio.gather(*asked, return_exceptions=True)

    assert all(isinstance(found, RejectedError) for found in world.run(many()))
    assert world.client.breaker.state == "closed" and world.calls == 80


# Connections and tokens --------------------------------------------------------------------------


def test_no_more_requests_at_once_than_asked() -> None:
    running, most = 0, 0

    async def handle(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return httpx.Response(200, json={})

    async def many() -> None:
        client = RemoteClient(ClientOptions(concurrency=3), transport=httpx.MockTransport(handle))
        await asyncio.gather(*(client.post(URL, {}) for _ in range(12)))
        await client.aclose()

    asyncio.run(many())
    assert most == 3


def test_a_server_that_never_answers_is_left_at_the_time_out() -> None:
    async def hang(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    async def ask() -> None:
        options = ClientOptions(timeout=0.01, attempts=2, backoff=1e-3)
        client = RemoteClient(options, transport=httpx.MockTransport(hang))
        try:
            await client.post(URL, {})
        finally:
            await client.aclose()

    with pytest.raises(RemoteUnavailableError, match="2 attempts: no response"):
        asyncio.run(ask())


@pytest.mark.parametrize("body", [b"", b"<html>", b"{", b"\xff\xfe", b"[" * 200_000])
def test_what_is_no_json_is_a_named_error(body: bytes) -> None:
    async def ask() -> None:
        answer: Callable[[httpx.Request], httpx.Response]
        answer = lambda request: httpx.Response(200, content=body)  # noqa: E731
        client = RemoteClient(ClientOptions(), transport=httpx.MockTransport(answer))
        await client.post(URL, {})

    with pytest.raises(RemoteAnswerError, match="not valid JSON"):
        asyncio.run(ask())


def test_a_token_that_changes_is_asked_for_at_every_try() -> None:
    tokens = iter(["one", "two", "three"])
    seen: list[str | None] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(503 if len(seen) < 3 else 200, json={})

    async def ask() -> None:
        client = RemoteClient(
            ClientOptions(backoff=1e-4),
            token=lambda: next(tokens),
            transport=httpx.MockTransport(handle),
        )
        await client.post(URL, {})

    asyncio.run(ask())
    assert seen == ["Bearer one", "Bearer two", "Bearer three"]


@pytest.mark.parametrize(
    "options",
    [
        *({"timeout": 0}, {"deadline": float("inf")}, {"attempts": 0}, {"concurrency": 1.5}),
        *({"open_after": True}, {"backoff": float("nan")}),
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        ClientOptions(**options)
