"""Calls in a thread that nothing waits for, and what is left of requests that are given up."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import threading
from collections.abc import Sequence

import httpx
import pytest
from hypothesis import given, strategies as st

from ensemble_rm import FunctionScorer, RewardEnsemble, Sample
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.ensemble.results import Scores
from ensemble_rm.errors import NotReadyError
from ensemble_rm.server import scheduling
from ensemble_rm.server.options import BatchOptions
from ensemble_rm.server.scheduling import Batcher, CallThread, ScoringThread
from tests.support.remote_members import member


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
    free, begun, thread = threading.Event(), threading.Event(), CallThread("calls")

    def call() -> bool:
        begun.set()
        return free.wait()

    async def ask() -> None:
        going_on = asyncio.ensure_future(thread.run(call))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        async with asyncio.timeout(0.01):
            await going_on

    with pytest.raises(TimeoutError):
        asyncio.run(ask())
    assert thread.busy
    free.set()
    thread.close()


def flat(parts: list[list[int]]) -> list[int]:
    return [number for part in parts for number in part]


@given(st.integers(1, 6), st.integers(1, 3))
def test_what_is_abandoned_is_refused_and_nothing_waits_for_it(requests: int, rows: int) -> None:
    """Of a scorer that never comes back: the batch that it has, and all that wait."""
    begun = 0

    async def score(_: str, samples: Sequence[int]) -> list[int]:
        nonlocal begun
        begun += 1
        await asyncio.Event().wait()
        return list(samples)

    async def ask() -> list[list[int] | BaseException]:
        options = BatchOptions(batch_samples=rows, window_seconds=0)
        batcher: Batcher[str, int, list[int]] = Batcher(
            score,
            join=flat,
            group=lambda sample: sample,
            cost=lambda _: (1, 1),
            options=options,
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


class PanicError(BaseException):
    """As those of libraries in Rust, which are no `Exception`."""


def panicking(sample: Sample) -> float:
    if "panic" in sample.completion:
        raise PanicError("index out of range")
    return float(len(sample.completion))


def ensemble() -> RewardEnsemble:
    scorer = FunctionScorer("length", panicking)
    return RewardEnsemble((scorer,), Normaliser.identity(1), mean())


def test_a_panic_is_an_error_of_its_call() -> None:
    def panic() -> None:
        raise PanicError("index out of range")

    async def ask() -> str:
        thread = CallThread("calls")
        with pytest.raises(RuntimeError, match="PanicError") as raised:
            await thread.run(panic)
        assert isinstance(raised.value.__cause__, PanicError)
        try:
            return await thread.run(lambda: "next")
        finally:
            thread.close()

    assert asyncio.run(ask()) == "next"


@given(st.lists(st.sampled_from(["a", "bb", "panic"]), max_size=9))
def test_a_panic_is_its_own_samples_failure(texts: list[str]) -> None:
    """Others of its batch have their rewards."""

    async def ask() -> Scores:
        scoring = ScoringThread()
        try:
            return await scoring(ensemble(), [Sample("q", text) for text in texts])
        finally:
            scoring.close()

    scores = asyncio.run(ask())
    assert len(scores) == len(texts)
    for row, text in enumerate(texts):
        if text == "panic":
            assert isinstance(scores.failed[row], RuntimeError)
            assert math.isnan(scores.reward[row])
        else:
            assert row not in scores.failed and scores.reward[row] == len(text)


def test_a_panic_asks_no_server_again() -> None:
    seen: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["query"]
        seen.extend(texts)
        return httpx.Response(200, json={"rewards": [2.0] * len(texts)})

    scorers = (member(httpx.MockTransport(handle)), FunctionScorer("length", panicking))
    whole = RewardEnsemble(scorers, Normaliser.identity(2), mean())
    texts = ["a", "bb", "panic", "cccc"]
    scores = whole.score([Sample("", text) for text in texts], on_error="record")
    assert list(scores.failed) == [2]
    assert seen == texts


@pytest.mark.parametrize("text", ["a", "panic"])
def test_the_time_spent_in_scoring_never_falls(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read wherever its clock is: a counter that falls reads as one that began anew."""
    scoring, now, seen = ScoringThread(), 0.0, [0.0]

    def clock() -> float:
        nonlocal now
        now += 1
        if inspect.stack()[1].function != "seconds":
            seen.append(scoring.seconds)
        return now

    monkeypatch.setattr(scheduling, "monotonic", clock)
    for _ in range(3):
        scoring._score(ensemble(), [Sample("q", text)])
        seen.append(scoring.seconds)
    assert seen == sorted(seen) and seen[-1] > 0


def test_a_batcher_whose_task_ended_takes_nothing_and_leaves_nobody_waiting() -> None:
    async def score(_: str, samples: Sequence[int]) -> list[int]:
        await asyncio.Event().wait()
        return list(samples)

    async def ask() -> None:
        options = BatchOptions(window_seconds=0)
        batcher: Batcher[str, int, list[int]] = Batcher(
            score,
            join=flat,
            group=lambda sample: sample,
            cost=lambda _: (1, 1),
            options=options,
        )
        assert not batcher.serving
        batcher.start()
        asked = asyncio.ensure_future(batcher.submit("v", [0]))
        await asyncio.sleep(0)
        assert batcher.serving and batcher._task is not None
        batcher._task.cancel()
        with pytest.raises(NotReadyError):
            await asked
        assert not batcher.serving
        with pytest.raises(NotReadyError):
            await batcher.submit("v", [0])

    asyncio.run(ask())
