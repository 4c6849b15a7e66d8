"""From requests to the scoring thread: a fair queue, batches, and the threads that load and score.

Concurrent requests mostly have one sample each. While a batch is scored, requests queue. When the
scoring thread is idle it takes what is queued, up to the budget, after waiting a few milliseconds
for more. `FairQueue` decides which samples are next, without a clock or an event loop; `Batcher`
drives it, and does not know what a sample is.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from ensemble_rm.data.samples import Sample
from ensemble_rm.ensemble.results import Scores
from ensemble_rm.errors import NotReadyError, QueueFullError, TooLargeError
from ensemble_rm.server.options import BatchOptions

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble


class Rows(Protocol):
    """Results of a batch, one row per sample, that can be sliced by row."""

    def __len__(self) -> int: ...
    def __getitem__(self, rows: slice, /) -> Any: ...


K = TypeVar("K", bound=Hashable)
S = TypeVar("S")
R = TypeVar("R", bound=Rows)
T = TypeVar("T")
_Call: TypeAlias = "tuple[Future[Any], Callable[[], Any]]"

_QUIET = 1 / 4  # of the window; an idle worker stops waiting after as long without a request
_SHARE = 0.02  # of the last batch's time
_LONGEST_WAIT = 0.1  # seconds; a worker that was idle for as long loses nothing by waiting
_TURNS = 32  # turns of the event loop within which a request that is being read arrives
_FIRST_RATE = 500.0  # tokens per second, until a batch has been measured
_SMOOTHING = 0.2
_LONGEST_RETRY = 60  # seconds
_TRIM_SECONDS = 20.0


# Queue -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Ticket(Generic[K, S]):
    """One request in the queue.

    Attributes
    ----------
    key : hashable
        Requests with different keys never share a batch: the version that scores them.
    samples : sequence
        At least one.
    groups : sequence of hashable
        What each sample shares with others: its prompt.
    costs : sequence of (int, int)
        Tokens of each sample: those that are shared, which count once per batch, and its own.
    taken : int
        Samples that are scored or being scored.
    group : hashable, optional
        The group of all samples; None if there are several.
    """

    key: K
    samples: Sequence[S]
    groups: Sequence[Hashable]
    costs: Sequence[tuple[int, int]]
    taken: int = 0
    group: Hashable | None = field(init=False)

    def __post_init__(self) -> None:
        first = self.groups[0]
        # One group if all samples share a prompt: such a ticket pulls others of that prompt.
        self.group = first if all(group == first for group in self.groups) else None

    @property
    def left(self) -> int:
        """Number of queued samples."""
        return len(self.samples) - self.taken

    @property
    def tokens_left(self) -> int:
        """Tokens of the queued samples, as if nothing were shared."""
        return sum(shared + own for shared, own in self.costs[self.taken :])

    @property
    def shared_left(self) -> int:
        """Those of `tokens_left` that samples of one group share."""
        return sum(shared for shared, _ in self.costs[self.taken :])


@dataclass(frozen=True)
class Part(Generic[K, S]):
    """The samples of one ticket in a batch: those from `start` to `stop`."""

    ticket: Ticket[K, S]
    start: int
    stop: int

    @property
    def samples(self) -> Sequence[S]:
        """The samples themselves."""
        return self.ticket.samples[self.start : self.stop]


@dataclass
class _Filling(Generic[K, S]):
    """A batch that is being filled."""

    tokens: int
    rows: int
    groups: set[Hashable] = field(default_factory=set)
    parts: list[Part[K, S]] = field(default_factory=list)
    count: int = 0
    used: int = 0

    def cost(self, ticket: Ticket[K, S], row: int) -> int:
        """Return the tokens that a sample adds."""
        shared, own = ticket.costs[row]
        return own + (0 if ticket.groups[row] in self.groups else shared)

    def fits(self, ticket: Ticket[K, S], row: int) -> bool:
        """Return whether a sample fits; every sample fits into an empty batch."""
        # A sample larger than the budget is scored alone rather than never.
        if self.count == 0:
            return True
        return self.count < self.rows and self.used + self.cost(ticket, row) <= self.tokens

    def add(self, ticket: Ticket[K, S]) -> bool:
        """Add what fits of a ticket; return whether all did."""
        start = stop = ticket.taken
        while stop < len(ticket.samples) and self.fits(ticket, stop):
            self.used += self.cost(ticket, stop)
            self.groups.add(ticket.groups[stop])
            self.count += 1
            stop += 1
        self.parts.append(Part(ticket, start, stop))
        ticket.taken = stop
        return stop == len(ticket.samples)


class FairQueue(Generic[K, S]):
    """Tickets in order of arrival, formed into batches within a budget.

    Invariants: The oldest ticket is in the next batch. A ticket overtakes another only if it shares
    the prompt of a ticket ahead of both. The part of a ticket that does not fit into a batch
    returns to the end, so that a large request does not delay small ones. A batch exceeds the
    budget only if it has one sample that does.

    Parameters
    ----------
    tokens : int
        Maximum tokens of a batch; a shared prompt counts once.
    rows : int
        Maximum samples of a batch.
    """

    def __init__(self, *, tokens: int, rows: int) -> None:
        self._budget, self._rows = tokens, rows
        self._order: OrderedDict[int, Ticket[K, S]] = OrderedDict()
        self._numbers: dict[Ticket[K, S], int] = {}
        self._groups: dict[Hashable, OrderedDict[int, Ticket[K, S]]] = {}
        self._next = count()
        self.samples = 0
        self.tokens = 0
        # `tokens` with the prompt of each group counted once; kept up to date by push and drop,
        # since `full_batch` is read at every arrival.
        self._distinct_tokens = 0

    def __len__(self) -> int:
        return len(self._order)

    @property
    def full_batch(self) -> bool:
        """Whether the queued samples fill a batch, the prompt of each group counted once."""
        return self._distinct_tokens >= self._budget or self.samples >= self._rows

    def push(self, ticket: Ticket[K, S]) -> None:
        """Add a ticket at the end."""
        number = next(self._next)
        self._numbers[ticket] = number
        self._order[number] = ticket
        self.samples += ticket.left
        self.tokens += ticket.tokens_left
        self._distinct_tokens += ticket.tokens_left
        if ticket.group is not None:
            friends = self._groups.setdefault(ticket.group, OrderedDict())
            self._distinct_tokens -= self._repeated(ticket, friends)
            friends[number] = ticket

    def drop(self, ticket: Ticket[K, S]) -> bool:
        """Remove a ticket; return whether it was queued."""
        number = self._numbers.pop(ticket, None)
        if number is None:
            return False
        del self._order[number]
        self.samples -= ticket.left
        self.tokens -= ticket.tokens_left
        self._distinct_tokens -= ticket.tokens_left
        if ticket.group is not None:
            friends = self._groups[ticket.group]
            del friends[number]
            self._distinct_tokens += self._repeated(ticket, friends)
            if not friends:
                del self._groups[ticket.group]
        return True

    @staticmethod
    def _repeated(ticket: Ticket[K, S], friends: OrderedDict[int, Ticket[K, S]]) -> int:
        """Tokens of a ticket that repeat a prompt, within it or within queued tickets."""
        return ticket.shared_left - (0 if friends else ticket.costs[0][0])

    def take(self) -> list[Part[K, S]]:
        """Form the next batch; empty if nothing is queued."""
        batch: _Filling[K, S] = _Filling(self._budget, self._rows)
        while self._order:
            head = next(iter(self._order.values()))
            # Another key is another version of the ensemble: one batch is of one version.
            if batch.parts and head.key != batch.parts[0].ticket.key:
                break
            if not self._move(head, batch):
                break
            if head.group is not None and not self._pull(head, batch):
                break
        return batch.parts

    def _pull(self, head: Ticket[K, S], batch: _Filling[K, S]) -> bool:
        """Move tickets with the head's prompt into the batch; return whether all fitted."""
        for friend in list(self._groups.get(head.group, {}).values()):
            if friend.key == head.key and not self._move(friend, batch):
                return False
        return True

    def _move(self, ticket: Ticket[K, S], batch: _Filling[K, S]) -> bool:
        """Move what fits of a ticket into the batch; return whether all did.

        The rest of a ticket goes to the end; a ticket without any fitting sample keeps its
        position.
        """
        if not batch.fits(ticket, ticket.taken):
            return False
        self.drop(ticket)
        whole = batch.add(ticket)
        # What did not fit goes to the end, so that a large request does not block small ones.
        if not whole:
            self.push(ticket)
        return whole


# Batcher -----------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What a batcher has done; `refused` counts requests that found the queue full."""

    batches: int = 0
    samples: int = 0
    dropped: int = 0
    refused: int = 0
    busy_seconds: float = 0.0


@dataclass(eq=False)
class _Pending(Generic[R]):
    """Results of a request so far, in the order of its samples, and how many are missing."""

    left: int
    done: asyncio.Future[None] = field(repr=False)
    parts: list[R] = field(default_factory=list)


class Batcher(Generic[K, S, R]):
    """Join requests into batches, and give each request its own results.

    Parameters
    ----------
    score : callable
        ``await score(key, samples)`` returns results with one row per sample, in their order.
    join : callable
        Joins the results of one request that was split over several batches.
    group : callable
        What a sample shares with others: its prompt.
    cost : callable
        Tokens of a sample: (shared, own).
    options : BatchOptions
    on_batch : callable, optional
        Called with a batch's number of samples and its seconds.
    """

    def __init__(
        self,
        score: Callable[[K, Sequence[S]], Awaitable[R]],
        *,
        join: Callable[[list[R]], R],
        group: Callable[[S], Hashable],
        cost: Callable[[S], tuple[int, int]],
        options: BatchOptions,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        self._score, self._join, self._group, self._cost = score, join, group, cost
        self._options, self._on_batch = options, on_batch
        self.queue: FairQueue[K, S] = FairQueue(
            tokens=options.batch_tokens, rows=options.batch_samples
        )
        self._pending: dict[Ticket[K, S], _Pending[R]] = {}
        self._arrived = asyncio.Event()
        self._closing = False
        self._rate = _FIRST_RATE
        self._ended = 0.0  # time of the last batch's end
        self._patience = options.window_seconds  # how long to wait for more after it
        self._together = False  # whether it, or the queue meanwhile, had several requests
        self._task: asyncio.Task[None] | None = None
        self.counts = Counts()

    # Requests ------------------------------------------------------------------------------------

    async def submit(self, key: K, samples: Sequence[S]) -> R:
        """Return the results of a request's samples, in their order.

        Cancelling it drops the samples that are not being scored yet.

        Parameters
        ----------
        key : hashable
        samples : sequence
            At least one.

        Raises
        ------
        QueueFullError
            If the queue is full.
        TooLargeError
            If the request is larger than the queue.
        NotReadyError
            If the batcher is closed.
        """
        if self._closing:
            raise NotReadyError("the server no longer scores")
        ticket = Ticket(
            key, samples, [self._group(s) for s in samples], list(map(self._cost, samples))
        )
        self._check_room(ticket)
        pending: _Pending[R] = _Pending(len(samples), asyncio.get_running_loop().create_future())
        self._pending[ticket] = pending
        self.queue.push(ticket)
        self._arrived.set()
        try:
            await pending.done
        finally:
            # Still pending means cancelled or failed: its samples leave the queue.
            if self._pending.pop(ticket, None) is not None:
                self.counts.dropped += 1
                self.queue.drop(ticket)
        return pending.parts[0] if len(pending.parts) == 1 else self._join(pending.parts)

    def _check_room(self, ticket: Ticket[K, S]) -> None:
        options, queue = self._options, self.queue
        if ticket.left > options.queue_samples or ticket.tokens_left > options.queue_tokens:
            raise TooLargeError(
                f"{ticket.left} samples with about {ticket.tokens_left} tokens in one request; the "
                f"queue holds {options.queue_samples} samples and {options.queue_tokens} tokens; "
                "send several requests"
            )
        if (
            queue.samples + ticket.left > options.queue_samples
            or queue.tokens + ticket.tokens_left > options.queue_tokens
        ):
            self.counts.refused += 1
            # Time to score what is queued, at the measured rate.
            seconds = min(max(math.ceil(queue.tokens / self._rate), 1), _LONGEST_RETRY)
            raise QueueFullError(
                f"queue is full with {queue.samples} samples; retry in {seconds} s", seconds
            )

    # Batches -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to score, in a task of the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        # If the task ended, requests would wait forever.
        self._task.add_done_callback(lambda _: self.abandon())

    @property
    def serving(self) -> bool:
        """Whether requests are accepted and scored."""
        return self._task is not None and not self._task.done() and not self._closing

    async def close(self) -> None:
        """Accept no more requests, score the accepted ones, and stop."""
        self._closing = True
        self._arrived.set()
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()

    def abandon(self) -> None:
        """Accept no more requests, and fail those that are queued or being scored.

        Each of them raises `NotReadyError`.
        """
        self._closing = True
        if self._task is not None:
            self._task.cancel()
        # Clients wait for futures, which no other task would complete.
        for ticket in list(self._pending):
            self._fail(ticket, NotReadyError("the server no longer scores"))

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
        """Wait for more requests while they arrive.

        Clients that were answered together send their next requests together: right after such a
        batch the wait may be a small share of the batch's time, where that is more than the window.
        A trainer's step sends all its groups at once: a worker that was idle takes the whole burst,
        so that each prompt is read once.
        """
        now, window = monotonic(), self._options.window_seconds
        idle = now - self._ended
        patient = self._together and idle <= self._patience
        rested = idle > _LONGEST_WAIT
        # Nobody waits at a rested server, so a first burst may gather for longer.
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
                if not await self._more_arrives():
                    return
            quiet = window

    async def _more_arrives(self) -> bool:
        """Return whether a request arrives in the next turns of the loop, which may be late."""
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
            # A wrong number of rows would give a client another client's rewards.
            if len(results) != len(samples):
                raise RuntimeError(f"{len(results)} results for {len(samples)} samples")
        except Exception as error:  # noqa: BLE001 - each request raises it; this task goes on
            for part in parts:
                self._fail(part.ticket, error)
            return
        self._count(len(samples), tokens, monotonic() - began)
        start = 0
        for part in parts:
            stop = start + part.stop - part.start
            self._deliver(part.ticket, results[start:stop])
            start = stop

    def _deliver(self, ticket: Ticket[K, S], results: R) -> None:
        pending = self._pending.get(ticket)
        if pending is None:  # the client is gone
            return
        # The parts of a ticket are taken in order, and batches are scored one after the other.
        pending.parts.append(results)
        pending.left -= len(results)
        if pending.left == 0:
            del self._pending[ticket]
            # The client may have left in this very turn.
            with suppress(asyncio.InvalidStateError):
                pending.done.set_result(None)

    def _fail(self, ticket: Ticket[K, S], error: Exception) -> None:
        self.queue.drop(ticket)
        pending = self._pending.pop(ticket, None)
        if pending is not None:
            with suppress(asyncio.InvalidStateError):
                pending.done.set_exception(error)

    def _count(self, samples: int, tokens: int, seconds: float) -> None:
        counts = self.counts
        first = counts.batches == 0
        counts.batches += 1
        counts.samples += samples
        counts.busy_seconds += seconds
        rate = tokens / max(seconds, 1e-6)
        # Exponential smoothing: one odd batch moves the estimate by a fifth.
        self._rate = rate if first else self._rate + _SMOOTHING * (rate - self._rate)
        if self._on_batch is not None:
            self._on_batch(samples, seconds)


# Threads ------------------------------------------------------------------------------------------


class CallThread:
    """Makes calls one after the other in a daemon thread of its own, which starts at the first.

    `concurrent.futures`, `asyncio.to_thread` and anyio wait for their worker threads when the
    process ends, and a call that waits for another server can take minutes.

    Parameters
    ----------
    name : str
        Name of the thread.

    Attributes
    ----------
    busy : bool
        Whether a call is running.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy = False

    async def run(self, call: Callable[[], T]) -> T:
        """Return what a call returns.

        Cancelling it drops the result; a running call continues.

        Raises
        ------
        Exception
            The error of the call; a `RuntimeError` for a `BaseException` that is not an
            `Exception`.
        """
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, args=(self._calls,), name=self._name, daemon=True
            )
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((future, call))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Stop the thread after its pending calls; another call starts a new thread."""
        self._calls.put(None)
        self._calls, self._thread = SimpleQueue(), None

    def _work(self, calls: SimpleQueue[_Call | None]) -> None:
        while (queued := calls.get()) is not None:
            self.busy = True
            _settle(*queued)
            self.busy = False
            del queued  # so that an idle thread keeps no ensemble alive


def as_failure(error: BaseException) -> RuntimeError:
    """Return an `Exception` for one that is not, such as a panic in Rust.

    Other exceptions would end the event loop.
    """
    failure = RuntimeError(f"the call raised {type(error).__name__}").with_traceback(
        error.__traceback__
    )
    failure.__cause__ = error
    return failure


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except Exception as error:  # noqa: BLE001 - raised where the result is awaited
        future.set_exception(error)
    except BaseException as error:  # noqa: BLE001 - a panic in Rust is one
        future.set_exception(as_failure(error))
    else:
        future.set_result(result)
    finally:
        del future, call  # breaks the cycle of future, error and its frames


class ScoringThread:
    """Scores samples in a thread of its own, one call after the other."""

    def __init__(self) -> None:
        self._thread = CallThread("scoring")
        self._clock: tuple[float, float | None] = (0.0, None)  # total; start of the running call
        self._release = MemoryRelease(_TRIM_SECONDS)

    @property
    def busy(self) -> bool:
        """Whether it is scoring."""
        return self._thread.busy

    @property
    def seconds(self) -> float:
        """Time spent scoring, including the running call."""
        spent, began = self._clock
        return spent + (0.0 if began is None else monotonic() - began)

    async def __call__(self, ensemble: RewardEnsemble, samples: Sequence[Sample]) -> Scores:
        """Score samples; failures are in `failed`."""
        return await self._thread.run(partial(self._score, ensemble, samples))

    def _score(self, ensemble: RewardEnsemble, samples: Sequence[Sample]) -> Scores:
        spent, began = self._clock[0], monotonic()
        self._clock = spent, began
        try:
            return ensemble.score(samples, on_error="record")
        finally:
            # One assignment: between two, another thread would see the total fall.
            self._clock = spent + monotonic() - began, None
            self._release()

    def close(self) -> None:
        """Stop the thread after its pending calls."""
        self._thread.close()


def _find_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim; None with another C library."""
    if sys.platform != "linux":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class MemoryRelease:
    """Returns freed memory to the operating system from time to time.

    Batches of varying shapes leave gaps that glibc does not return: after minutes of scoring, a
    fifth of the process's memory.

    Parameters
    ----------
    every : float
        Seconds between two releases; each takes milliseconds.
    """

    def __init__(self, every: float) -> None:
        self._every, self._last = every, monotonic()
        self._trim = _find_trim()

    def __call__(self) -> None:
        """Release memory if the last release was long enough ago."""
        if self._trim is not None and monotonic() - self._last >= self._every:
            self._trim(0)
            self._last = monotonic()
