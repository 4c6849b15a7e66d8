"""The threads that load and score, so that the event loop never waits for a model.

`concurrent.futures`, `asyncio.to_thread` and anyio wait for their worker threads when the process
ends; a call that waits for another server can take minutes. These are daemon threads, which do not
keep a process from ending.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ensemble_rm.data.samples import Sample
from ensemble_rm.ensemble.results import Scores

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

T = TypeVar("T")
_Call: TypeAlias = "tuple[Future[Any], Callable[[], Any]]"
_TRIM_SECONDS = 20.0


class CallThread:
    """Makes calls one after the other in a daemon thread of its own, which starts at the first.

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

        Cancelling it gives the result up; a call that is running goes on.

        Raises
        ------
        Exception
            What the call raises; a `RuntimeError` if it raises something that is no `Exception`.
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
        """Let the thread end after the calls that it has; another call starts a new thread."""
        self._calls.put(None)
        self._calls, self._thread = SimpleQueue(), None

    def _work(self, calls: SimpleQueue[_Call | None]) -> None:
        while (queued := calls.get()) is not None:
            self.busy = True
            _settle(*queued)
            self.busy = False
            del queued  # an idle thread keeps no ensemble alive


def as_failure(error: BaseException) -> RuntimeError:
    """Return the failure of a call that raised no `Exception`, such as a panic in Rust.

    An event loop ends at anything other than an `Exception`.
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
        del future, call  # an error's frames would hold the future that holds the error


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
        """Let the thread end once it has scored what it was given."""
        self._thread.close()


def _find_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim; None with another C library."""
    if sys.platform != "linux":
        return None
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim


class MemoryRelease:
    """Returns freed memory to the operating system from time to time.

    Batches of ever different shapes leave gaps that glibc keeps for itself: after minutes of
    scoring, a fifth of the process's memory.

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
