"""Who shares a batch with whom: the laws of the queue and of the batcher."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from ensemble_rm.errors import NotReadyError, OptionError, QueueFullError, TooLargeError
from ensemble_rm.server import scheduling
from ensemble_rm.server.options import BatchOptions
from ensemble_rm.server.scheduling import Batcher, FairQueue, Part, Ticket

# A sample is (group, own tokens, its own number); the group's tokens are shared.
Item = tuple[int, int, int]
SHARED = 5

requests = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=6),
    ),
    max_size=14,
)


def tickets(drawn: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> list[Ticket[int, Item]]:
    found, number = [], 0
    for key, rows in drawn:
        items = []
        for group, own in rows:
            items.append((group, own, number))
            number += 1
        found.append(ticket(key, items))
    return found


def ticket(key: int, items: Sequence[Item]) -> Ticket[int, Item]:
    return Ticket(key, items, [i[0] for i in items], [(SHARED, i[1]) for i in items])


def cost(parts: Sequence[Part[int, Item]]) -> int:
    items = [item for part in parts for item in part.samples]
    return sum(item[1] for item in items) + SHARED * len({item[0] for item in items})


def drain(queue: FairQueue[int, Item]) -> list[list[Part[int, Item]]]:
    found = []
    while len(queue):
        found.append(queue.take())
        assert found[-1], "an empty batch of a queue that is not"
    return found


@given(requests, st.integers(8, 40), st.integers(1, 8))
def test_every_sample_is_taken_once_within_the_budget(
    drawn: list[tuple[int, list[tuple[int, int]]]], tokens: int, rows: int
) -> None:
    queue: FairQueue[int, Item] = FairQueue(tokens=tokens, rows=rows)
    asked = tickets(drawn)
    for one in asked:
        queue.push(one)
    batches = drain(queue)
    taken = [item for parts in batches for part in parts for item in part.samples]
    assert sorted(taken, key=lambda i: i[2]) == [i for one in asked for i in one.samples]
    for parts in batches:
        size = sum(len(part.samples) for part in parts)
        assert size <= rows and (cost(parts) <= tokens or size == 1)
        assert len({part.ticket.key for part in parts}) == 1
    assert (queue.samples, queue.tokens, queue._distinct_tokens) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=20))
def test_a_batch_is_full_where_what_waits_fills_it(rows: list[tuple[int, int]]) -> None:
    asked = [ticket(0, [(group, own, i)]) for i, (group, own) in enumerate(rows)]
    needed = cost([Part(one, 0, 1) for one in asked])
    for budget in (needed, needed + 1):
        queue: FairQueue[int, Item] = FairQueue(tokens=budget, rows=100)
        for one in asked:
            one.taken = 0
            queue.push(one)
        assert queue.full_batch == (budget == needed)
        assert sum(len(part.samples) for part in queue.take()) == len(rows)


@given(requests, st.integers(8, 40), st.integers(1, 8))
def test_the_oldest_goes_first_and_only_friends_overtake(
    drawn: list[tuple[int, list[tuple[int, int]]]], tokens: int, rows: int
) -> None:
    queue: FairQueue[int, Item] = FairQueue(tokens=tokens, rows=rows)
    waiting = tickets(drawn)
    for one in waiting:
        queue.push(one)
    while waiting:
        parts = queue.take()
        assert parts[0].ticket is waiting[0]
        seen = [part.ticket for part in parts]
        for i, one in enumerate(waiting):
            if one in seen:
                continue
            # Whatever is behind one that is left shares its prompt with one before it.
            before = {t.group for t in waiting[:i] if t in seen}
            assert all(t.group in before for t in waiting[i + 1 :] if t in seen)
            break
        left_over = [one for one in seen if one.left]
        waiting = [one for one in waiting if one not in seen] + left_over


def test_friends_come_along() -> None:
    queue: FairQueue[int, Item] = FairQueue(tokens=100, rows=3)
    asked = [ticket(0, [(group, 1, i)]) for i, group in enumerate([7, 8, 7, 8, 7])]
    for one in asked:
        queue.push(one)
    assert [part.samples[0][2] for part in queue.take()] == [0, 2, 4]
    assert [part.samples[0][2] for part in queue.take()] == [1, 3]


def test_a_large_request_does_not_hold_up_small_ones() -> None:
    queue: FairQueue[int, Item] = FairQueue(tokens=1000, rows=4)
    queue.push(ticket(0, [(i, 1, i) for i in range(10)]))
    queue.push(ticket(0, [(50, 1, 50)]))
    assert [len(part.samples) for part in queue.take()] == [4]
    second = queue.take()
    assert [part.samples[0][2] for part in second] == [50, 4]


@given(requests, st.data())
def test_what_is_dropped_is_never_taken(
    drawn: list[tuple[int, list[tuple[int, int]]]], data: st.DataObject
) -> None:
    queue: FairQueue[int, Item] = FairQueue(tokens=20, rows=4)
    asked = tickets(drawn)
    for one in asked:
        queue.push(one)
    gone = [one for one in asked if data.draw(st.booleans())]
    assert all(queue.drop(one) for one in gone)
    assert not any(queue.drop(one) for one in gone)
    taken = {part.ticket for parts in drain(queue) for part in parts}
    assert taken == set(asked) - set(gone)


# The batcher -----------------------------------------------------------------------------------


class Worker:
    """Doubles numbers; keeps what it was given; can be held back."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self, key: int, samples: Sequence[int]) -> list[int]:
        self.batches.append(list(samples))
        await self.free.wait()
        await asyncio.sleep(0)
        if key < 0:
            raise ValueError("broken")
        return [2 * sample for sample in samples]


def make(worker: Worker, **options: object) -> Batcher[int, int, list[int]]:
    chosen = BatchOptions(**({"window_seconds": 0.002} | options))  # type: ignore[arg-type]
    return Batcher(
        worker,
        join=lambda parts: [number for part in parts for number in part],
        group=lambda s: s % 3,
        cost=lambda s: (2, 3),
        options=chosen,
    )


@given(
    st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=5), max_size=20),
    st.sets(st.integers(0, 19)),
    st.integers(1, 6),
)
def test_no_answer_is_lost_doubled_or_mixed_up(
    asked: list[list[int]], leaving: set[int], rows: int
) -> None:
    async def run() -> None:
        worker = Worker()
        batcher = make(worker, batch_samples=rows)
        batcher.start()
        tasks = [asyncio.ensure_future(batcher.submit(0, samples)) for samples in asked]
        await asyncio.sleep(0)
        for i in leaving & set(range(len(tasks))):
            tasks[i].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for i, (samples, answer) in enumerate(zip(asked, found, strict=True)):
            if i in leaving:
                assert isinstance(answer, asyncio.CancelledError)
            else:
                assert answer == [2 * s for s in samples]
        await batcher.close()
        scored = sorted(s for batch in worker.batches for s in batch)
        every = sorted(s for samples in asked for s in samples)
        stay = [s for i, samples in enumerate(asked) if i not in leaving for s in samples]
        # Nothing is scored twice, and nobody who stayed is left out.
        assert not Counter(scored) - Counter(every)
        assert not Counter(stay) - Counter(scored)
        assert all(len(batch) <= rows for batch in worker.batches)

    asyncio.run(run())


def test_requests_that_come_while_a_batch_is_scored_are_the_next_one() -> None:
    async def run() -> None:
        worker = Worker()
        worker.free.clear()
        batcher = make(worker)
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(0, [0]))
        while not worker.batches:
            await asyncio.sleep(0)
        others = [asyncio.ensure_future(batcher.submit(0, [i])) for i in range(1, 9)]
        await asyncio.sleep(0)
        worker.free.set()
        assert await asyncio.gather(first, *others) == [[2 * i] for i in range(9)]
        # Those that share a prompt stand side by side.
        assert worker.batches == [[0], [1, 4, 7, 2, 5, 8, 3, 6]]
        await batcher.close()

    asyncio.run(run())


@pytest.mark.parametrize("idle", [True, False])
def test_a_burst_is_taken_in_whole_by_a_worker_that_was_idle(
    idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batcher's own clock is turned by hand; each request comes 0.9 windows after another."""
    clock = [100.0]
    monkeypatch.setattr(scheduling, "monotonic", lambda: clock[0])
    monkeypatch.setattr(scheduling, "_LONGEST_WAIT", 10.0)

    async def run() -> list[list[int]]:
        worker = Worker()
        batcher = make(worker, batch_samples=4, window_seconds=1.0)
        batcher._ended = clock[0] - (20.0 if idle else 5.0)
        batcher.start()
        asked = []
        for i in range(4):
            asked.append(asyncio.ensure_future(batcher.submit(0, [i])))
            for _ in range(20):
                await asyncio.sleep(0)
            clock[0] += 0.9
        await asyncio.gather(*asked)
        await batcher.close()
        return worker.batches

    sizes = [len(batch) for batch in asyncio.run(run())]
    assert sizes == [4] if idle else len(sizes) > 1


def test_what_a_client_gave_up_is_not_scored() -> None:
    async def run() -> None:
        worker = Worker()
        worker.free.clear()
        batcher = make(worker)
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(0, [0]))
        while not worker.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.ensure_future(batcher.submit(0, [i])) for i in (1, 2, 3)]
        await asyncio.sleep(0)
        others[1].cancel()
        await asyncio.sleep(0)
        assert batcher.queue.samples == 2
        worker.free.set()
        assert await first == [0]
        await batcher.close()
        assert worker.batches == [[0], [1, 3]]

    asyncio.run(run())


def test_what_a_client_gave_up_while_it_is_scored_harms_nobody() -> None:
    async def run() -> None:
        worker = Worker()
        worker.free.clear()
        batcher = make(worker)
        batcher.start()
        tasks = [asyncio.ensure_future(batcher.submit(0, [i])) for i in range(3)]
        while not worker.batches:
            await asyncio.sleep(0.001)
        tasks[1].cancel()
        await asyncio.sleep(0)
        worker.free.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert found[0] == [0] and found[2] == [4]
        assert isinstance(found[1], asyncio.CancelledError)
        assert batcher.counts.dropped == 1 and len(worker.batches) == 1
        await batcher.close()

    asyncio.run(run())


def test_a_broken_worker_is_an_error_and_the_next_batch_is_served() -> None:
    async def run() -> None:
        batcher = make(Worker(), batch_samples=2)
        batcher.start()
        with pytest.raises(ValueError, match="broken"):
            await batcher.submit(-1, [1, 2, 3, 4, 5])
        assert len(batcher.queue) == 0
        assert await batcher.submit(0, [1]) == [2]
        await batcher.close()

    asyncio.run(run())


def test_a_full_queue_says_when_to_come_again() -> None:
    async def run() -> None:
        worker = Worker()
        worker.free.clear()
        batcher = make(worker, queue_samples=4, batch_samples=1)
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(0, [0]))
        while not worker.batches:
            await asyncio.sleep(0.001)
        waiting = [asyncio.ensure_future(batcher.submit(0, [i])) for i in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="full with 4 samples") as refused:
            await batcher.submit(0, [9])
        assert refused.value.retry_after >= 1 and refused.value.status == 429
        with pytest.raises(TooLargeError):
            await batcher.submit(0, list(range(5)))
        assert batcher.counts.refused == 1  # the other was never one for this queue
        worker.free.set()
        assert await asyncio.gather(first, *waiting) == [[0], [0], [2], [4], [6]]
        assert await batcher.submit(0, [9]) == [18]
        await batcher.close()

    asyncio.run(run())


def test_closing_finishes_what_was_accepted() -> None:
    async def run() -> None:
        worker = Worker()
        batcher = make(worker, batch_samples=2)
        batcher.start()
        tasks = [asyncio.ensure_future(batcher.submit(0, [i])) for i in range(7)]
        await asyncio.sleep(0)
        await batcher.close()
        with pytest.raises(NotReadyError):
            await batcher.submit(0, [1])
        assert [task.result() for task in tasks] == [[2 * i] for i in range(7)]

    asyncio.run(run())


@pytest.mark.parametrize(
    "options",
    [{"batch_tokens": 0}, {"batch_samples": 0}, {"window_seconds": 2.0}, {"queue_samples": 0}],
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        BatchOptions(**options)  # type: ignore[arg-type]
