"""Concurrent requests, mostly of one sample each, join into common batches.

While one batch is scored, requests gather; when the worker is free it takes what there is, up to
the budget, after a few milliseconds' window at most, or a small share of the last batch's time.
Knows the event loop and the queue; knows nothing of HTTP, of models or of what a sample is.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar

from ensemble_rm.errors import NotReadyError, QueueFullError, TooLargeError
from ensemble_rm.server.options import BatchOptions
from ensemble_rm.server.scheduling.queue import FairQueue, Part, Ticket

K = TypeVar("K", bound=Hashable)
S = TypeVar("S")
R = TypeVar("R")

_QUIET = 1 / 4  # of the window: as long without another, and an idle worker waits no more
_SHARE = 0.02  # of the last batch's time
_LONGEST_WAIT = 0.1  # seconds; a worker that was idle for as long loses nothing by it
_TURNS = 32  # of the loop, in which a request that is being read arrives
_FIRST_RATE = 500.0  # tokens a second, until a batch has been measured
_SMOOTHING = 0.2
_LONGEST = 60  # seconds of Retry-After


@dataclass
class Counts:
    """What a batcher has done so far; `refused` are those that found the queue full."""

    batches: int = 0
    samples: int = 0
    dropped: int = 0
    refused: int = 0
    busy_seconds: float = 0.0


@dataclass(eq=False)
class _Waiting(Generic[R]):
    results: list[R | None]
    left: int
    done: asyncio.Future[None] = field(repr=False)


class Batcher(Generic[K, S, R]):
    """Join requests into batches, and give each its own results.

    Parameters
    ----------
    score : callable
        ``await score(key, samples)`` gives one result a sample, in their order.
    group : callable
        What a sample shares with others: its prompt.
    cost : callable
        A sample's tokens: of what it shares, and of its own.
    options : BatchOptions
    on_batch : callable, optional
        Called with a batch's number of samples and its seconds.
    """

    def __init__(
        self,
        score: Callable[[K, Sequence[S]], Awaitable[Sequence[R]]],
        *,
        group: Callable[[S], Hashable],
        cost: Callable[[S], tuple[int, int]],
        options: BatchOptions,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        self._score, self._group, self._cost = score, group, cost
        self._options, self._on_batch = options, on_batch
        self.queue: FairQueue[K, S] = FairQueue(
            tokens=options.batch_tokens, rows=options.batch_samples
        )
        self._waiting: dict[Ticket[K, S], _Waiting[R]] = {}
        self._arrived = asyncio.Event()
        self._closing = False
        self._rate = _FIRST_RATE
        self._ended = 0.0  # the last batch,
        self._patience = options.window_seconds  # how long others are waited for after it,
        self._together = False  # and whether it, or what waited meanwhile, were several requests
        self._task: asyncio.Task[None] | None = None
        self.counts = Counts()

    # Requests --------------------------------------------------------------------------------

    async def submit(self, key: K, samples: Sequence[S]) -> list[R]:
        """Return the results of a request's samples, in their order.

        To cancel it is to give it up: what of it is not being scored yet, never is.

        Raises
        ------
        QueueFullError
            If as much waits as may.
        TooLargeError
            If the request alone is more than that.
        NotReadyError
            If the batcher was closed.
        """
        if self._closing:
            raise NotReadyError("the server scores no more")
        if not samples:
            return []
        ticket = Ticket(
            key, samples, [self._group(s) for s in samples], list(map(self._cost, samples))
        )
        self._check_room(ticket)
        waiting: _Waiting[R] = _Waiting(
            [None] * len(samples), len(samples), asyncio.get_running_loop().create_future()
        )
        self._waiting[ticket] = waiting
        self.queue.push(ticket)
        self._arrived.set()
        try:
            await waiting.done
        finally:
            if self._waiting.pop(ticket, None) is not None:
                self.counts.dropped += 1
                self.queue.drop(ticket)
        return waiting.results  # type: ignore[return-value]  # every place is filled

    def _check_room(self, ticket: Ticket[K, S]) -> None:
        options, queue = self._options, self.queue
        if ticket.left > options.queue_samples or ticket.tokens_left > options.queue_tokens:
            raise TooLargeError(
                f"{ticket.left} samples of about {ticket.tokens_left} tokens in one request; the "
                f"queue holds {options.queue_samples} and {options.queue_tokens}: send several"
            )
        if (
            queue.samples + ticket.left > options.queue_samples
            or queue.tokens + ticket.tokens_left > options.queue_tokens
        ):
            self.counts.refused += 1
            seconds = min(max(math.ceil(queue.tokens / self._rate), 1), _LONGEST)
            raise QueueFullError(
                f"{queue.samples} samples wait already; come again in {seconds} s", seconds
            )

    # Batches ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to score, in a task of the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(lambda _: self.abandon())  # nobody waits for a task that ended

    @property
    def serving(self) -> bool:
        """Whether it takes requests and scores them."""
        return self._task is not None and not self._task.done() and not self._closing

    async def close(self) -> None:
        """Take nothing more, score what was taken, and end."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()

    def abandon(self) -> None:
        """Take nothing more, and end: what waits or is being scored fails.

        Whoever submitted it raises `NotReadyError`.
        """
        self._closing = True
        if self._task is not None:
            self._task.cancel()
        for ticket in list(self._waiting):
            self._fail(ticket, NotReadyError("the server scores no more"))

    async def _run(self) -> None:
        while True:
            while not len(self.queue):
                if self._closing:
                    return
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            parts = self.queue.take()
            if parts:
                began = monotonic()
                await self._serve(parts)
                self._ended = monotonic()
                window = self._options.window_seconds
                share = _SHARE * (self._ended - began)
                self._patience = max(window, min(share, _LONGEST_WAIT))
                self._together = len(parts) > 1 or len(self.queue) > 0

    async def _gather(self) -> None:
        """Wait for others while they come.

        Those that were answered together ask again together: right after such a batch the wait may
        take a small share of what the batch took, where that is more than the window. A trainer's
        step asks for all its groups at once: a worker that was idle takes in such a burst, so that
        each prompt is read once.
        """
        now, window = monotonic(), self._options.window_seconds
        idle = now - self._ended
        patient = self._together and idle <= self._patience
        rested = idle > _LONGEST_WAIT
        wait = self._patience if patient else max(window, _LONGEST_WAIT) if rested else window
        deadline = now + wait
        quiet = window if patient else window * _QUIET
        while not self.queue.full_batch and not self._closing:
            left = deadline - monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(min(left, quiet)):
                    await self._arrived.wait()
            except TimeoutError:
                if not await self._turns():
                    return
            quiet = window

    async def _turns(self) -> bool:
        """Say whether another comes in the loop's next turns: a busy loop is late with it."""
        for _ in range(_TURNS):
            if self._arrived.is_set():
                return True
            await asyncio.sleep(0)
        return False

    async def _serve(self, parts: Sequence[Part[K, S]]) -> None:
        samples = [sample for part in parts for sample in part.samples]
        tokens = sum(
            sum(part.ticket.costs[i]) for part in parts for i in range(part.start, part.stop)
        )
        began = monotonic()
        try:
            results = await self._score(parts[0].ticket.key, samples)
            if len(results) != len(samples):
                raise RuntimeError(f"{len(results)} results for {len(samples)} samples")
        except Exception as error:  # noqa: BLE001 - each request raises it; this task goes on
            for part in parts:
                self._fail(part.ticket, error)
            return
        spent = monotonic() - began
        self._count(len(samples), tokens, spent)
        place = 0
        for part in parts:
            size = part.stop - part.start
            self._fill(part, results[place : place + size])
            place += size

    def _fill(self, part: Part[K, S], results: Sequence[R]) -> None:
        waiting = self._waiting.get(part.ticket)
        if waiting is None:  # given up meanwhile
            return
        waiting.results[part.start : part.stop] = results
        waiting.left -= len(results)
        if waiting.left == 0:
            del self._waiting[part.ticket]
            with suppress(asyncio.InvalidStateError):
                waiting.done.set_result(None)

    def _fail(self, ticket: Ticket[K, S], error: Exception) -> None:
        self.queue.drop(ticket)
        waiting = self._waiting.pop(ticket, None)
        if waiting is not None:
            with suppress(asyncio.InvalidStateError):
                waiting.done.set_exception(error)

    def _count(self, samples: int, tokens: int, seconds: float) -> None:
        counts = self.counts
        first = counts.batches == 0
        counts.batches += 1
        counts.samples += samples
        counts.busy_seconds += seconds
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if first else self._rate + _SMOOTHING * (rate - self._rate)
        if self._on_batch is not None:
            self._on_batch(samples, seconds)
