"""Calls in a thread that nothing waits for, and what is left of requests that are given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_rm.errors import NotReadyError
from ensemble_rm.server.batching import Batcher, BatchOptions
from ensemble_rm.server.threads import CallThread


@given(st.lists(st.integers(-3, 3), max_size=20))
def test_calls_are_made_in_their_order_by_one_daemon_thread(numbers: list[int]) -> None:
    made: list[tuple[int, int]] = []

    def call(i: int) -> float:
        thread = threading.current_thread()
        assert thread.daemon
        made.append((i, thread.ident or 0))
        return 1 / numbers[i]

    async def ask() -> list[float | BaseException]:
        thread = CallThread("calls")
        calls = (thread.run(lambda i=i: call(i)) for i in range(len(numbers)))  # type: ignore[misc]
        found = await asyncio.gather(*calls, return_exceptions=True)
        thread.close()
        return found

    found = asyncio.run(ask())
    assert [i for i, _ in made] == list(range(len(numbers)))
    assert len({ident for _, ident in made}) <= 1
    for number, one in zip(numbers, found, strict=True):
        assert isinstance(one, ZeroDivisionError) if number == 0 else one == 1 / number


def test_a_call_that_is_given_up_before_it_began_is_never_made() -> None:
    free, made = threading.Event(), []

    async def ask() -> None:
        thread = CallThread("calls")
        first = asyncio.ensure_future(thread.run(free.wait))
        second = asyncio.ensure_future(thread.run(lambda: made.append("second")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        free.set()
        assert await first
        assert await thread.run(lambda: "third") == "third"
        thread.close()
        assert await thread.run(lambda: "again") == "again"
        thread.close()

    asyncio.run(ask())
    assert made == []


def test_a_loop_ends_though_its_call_does_not() -> None:
    free, thread = threading.Event(), CallThread("calls")

    async def ask() -> None:
        async with asyncio.timeout(0.01):
            await thread.run(free.wait)

    with pytest.raises(TimeoutError):
        asyncio.run(ask())
    assert thread.busy
    free.set()
    thread.close()


@given(st.integers(1, 6), st.integers(1, 3))
def test_what_is_abandoned_is_refused_and_nothing_waits_for_it(requests: int, rows: int) -> None:
    """Of a scorer that never comes back: the batch that it has, and all that wait."""
    begun = 0

    async def score(_: str, samples: Sequence[int]) -> Sequence[int]:
        nonlocal begun
        begun += 1
        await asyncio.Event().wait()
        return samples

    async def ask() -> list[list[int] | BaseException]:
        options = BatchOptions(rows=rows, window_seconds=0)
        batcher: Batcher[str, int, int] = Batcher(
            score, group=lambda sample: sample, cost=lambda _: (1, 1), options=options
        )
        batcher.start()
        asked = [asyncio.ensure_future(batcher.submit("v", [i, i])) for i in range(requests)]
        while not begun:
            await asyncio.sleep(0)
        batcher.abandon()
        with pytest.raises(NotReadyError):
            await batcher.submit("v", [0])
        await batcher.close()
        assert not len(batcher.queue)
        assert batcher.counts.dropped == 0
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [type(one) for one in asyncio.run(ask())] == [NotReadyError] * requests
    assert begun == 1
