"""An event loop in its own thread, so that synchronous code can run coroutines.

The callers may themselves run in an event loop, which forbids `asyncio.run`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

from ensemble_rm.errors import RemoteUnavailableError

T = TypeVar("T")
Item = TypeVar("Item")

_JOIN = 5.0  # maximum seconds to wait for a loop to close


class Pending(Generic[T]):
    """A coroutine running in a loop's thread: wait for its result, or cancel it.

    Parameters
    ----------
    future : concurrent.futures.Future
    read : callable
        Converts the future's result to that of `result`; called in the waiting thread.
    """

    def __init__(self, future: Future[Any], read: Callable[[Any], T]) -> None:
        self._future, self._read = future, read

    def result(self) -> T:
        """Wait for the result; an interrupt cancels the coroutine.

        Raises
        ------
        RemoteUnavailableError
            If the loop was closed before the coroutine ended.
        """
        try:
            value = self._future.result()
        except CancelledError:
            raise RemoteUnavailableError(
                "the member was closed while a request was pending; score again, and close the "
                "member only when no request is pending"
            ) from None
        except BaseException:
            self._future.cancel()
            raise
        return self._read(value)

    def cancel(self) -> None:
        """Cancel the coroutine unless it has ended."""
        self._future.cancel()


class LoopThread:
    """Runs coroutines for callers in any thread.

    The thread starts with the first coroutine and ends when its owner is collected or closed.

    Parameters
    ----------
    closing : callable
        Returns an awaitable that runs in the loop before it ends.
    """

    def __init__(self, closing: Callable[[], Awaitable[None]]) -> None:
        self._closing = closing
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._end: weakref.finalize[Any, Any] | None = None
        _THREADS.add(self)

    def begin(self, coroutine: Coroutine[Any, Any, Item], read: Callable[[Item], T]) -> Pending[T]:
        """Start a coroutine; `read` converts its result when a caller waits for it."""
        with self._lock:  # the loop must not close before the coroutine is scheduled
            return Pending(asyncio.run_coroutine_threadsafe(coroutine, self._running()), read)

    def close(self) -> None:
        """Cancel all coroutines and end the loop's thread; the next `begin` starts a new one."""
        with self._lock:  # held until the end: two loops must not share open connections
            # Detached and called directly, since finalisers do nothing while the process exits.
            finaliser = self._end.detach() if self._end is not None else None
            ending = finaliser[1](*finaliser[2]) if finaliser is not None else None
            self._loop = self._end = None
            if ending is not None and threading.current_thread() is not ending[1]:
                done, thread = ending
                with suppress(TimeoutError):
                    done.result(_JOIN)
                thread.join(_JOIN)

    def _running(self) -> asyncio.AbstractEventLoop:
        """Return the loop, started if necessary; the caller holds the lock."""
        # A forked child inherits the loop but not its thread.
        if self._loop is None or self._process != os.getpid():
            if self._end is not None:
                self._end.detach()
            loop = asyncio.new_event_loop()
            thread = threading.Thread(
                target=_run, args=(loop,), name="ensemble_rm-remote", daemon=True
            )
            thread.start()
            self._loop, self._process = loop, os.getpid()
            self._end = weakref.finalize(self, _end, loop, thread, self._closing)
            self._end.atexit = False  # `_close_all` closes them at exit and waits
        return self._loop


_THREADS: weakref.WeakSet[LoopThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for thread in list(_THREADS):
        thread.close()


def _renew_locks() -> None:
    for thread in list(_THREADS):
        thread._lock = threading.Lock()


# A lock that another thread held at the fork would stay locked in the child forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    closing: Callable[[], Awaitable[None]],
) -> tuple[Future[None], threading.Thread] | None:
    """Tell a loop to end, without waiting for it.

    The garbage collector may call this in any thread, the loop's own included, while the thread
    holds any lock. Waiting could deadlock: to close its connections the loop may need one of these
    locks, such as an import lock.
    """

    async def finish() -> None:
        try:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await closing()
        finally:
            loop.call_soon(loop.stop)

    if not thread.is_alive():
        return None
    return asyncio.run_coroutine_threadsafe(finish(), loop), thread


async def work_through(
    items: Iterable[Item], work: Callable[[Item], Awaitable[None]], *, places: int
) -> None:
    """Run `work` for every item, at most `places` at once; the first error cancels the rest."""
    remaining = iter(items)

    async def worker() -> None:
        for item in remaining:  # shared by all workers, so that each item is taken once
            await work(item)

    tasks = [asyncio.ensure_future(worker()) for _ in range(places)]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
