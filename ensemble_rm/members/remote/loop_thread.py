"""An event loop in its own thread, so that synchronous code can await, inside a loop or not."""

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

_JOIN = 5.0  # seconds that a closing loop may take


class Pending(Generic[T]):
    """A coroutine that runs in a loop's thread: wait for its result, or cancel it.

    Parameters
    ----------
    future : concurrent.futures.Future
    read : callable
        Turns the future's result into what `result` returns, in the waiting thread.
    """

    def __init__(self, future: Future[Any], read: Callable[[Any], T]) -> None:
        self._future, self._read = future, read

    def result(self) -> T:
        """Wait for the result; an interrupt cancels the coroutine.

        Raises
        ------
        RemoteUnavailableError
            If the loop was closed before it was done.
        """
        try:
            found = self._future.result()
        except CancelledError:
            raise RemoteUnavailableError(
                "a member was closed while its server was asked; ask again, and close it when "
                "nobody waits for it"
            ) from None
        except BaseException:
            self._future.cancel()
            raise
        return self._read(found)

    def cancel(self) -> None:
        """Cancel the coroutine if it is not done."""
        self._future.cancel()


class LoopThread:
    """Runs coroutines for callers of any thread; starts at its first, ends with its owner.

    Parameters
    ----------
    closing : callable
        Returns what is awaited in the loop before it ends.
    """

    def __init__(self, closing: Callable[[], Awaitable[None]]) -> None:
        self._closing = closing
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._end: weakref.finalize[Any, Any] | None = None
        _ALL.add(self)

    def begin(self, coroutine: Coroutine[Any, Any, Item], read: Callable[[Item], T]) -> Pending[T]:
        """Begin a coroutine, whose result is read when it is waited for."""
        with self._lock:  # the loop cannot close before it has the coroutine
            return Pending(asyncio.run_coroutine_threadsafe(coroutine, self._running()), read)

    def close(self) -> None:
        """End the loop and its thread, and what goes on in it; another call starts new ones."""
        with self._lock:  # until all is closed: two loops would share what is open
            # Detached and called: at the exit of the process a finaliser itself does nothing.
            known = self._end.detach() if self._end is not None else None
            ending = known[1](*known[2]) if known is not None else None
            self._loop = self._end = None
            if ending is not None and threading.current_thread() is not ending[1]:
                done, thread = ending
                with suppress(TimeoutError):
                    done.result(_JOIN)
                thread.join(_JOIN)

    def _running(self) -> asyncio.AbstractEventLoop:
        """Return the loop; the caller holds the lock."""
        # A forked child has the loop and not its thread.
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
            self._end.atexit = False  # at the exit they are waited for
        return self._loop


_ALL: weakref.WeakSet[LoopThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for one in list(_ALL):
        one.close()


def _renew_locks() -> None:
    for one in list(_ALL):
        one._lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a child has no thread that would give back what it held
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
    """Ask a loop to end, and wait for nothing.

    A garbage collection calls this in any thread, the loop's own too, whatever locks it holds; the
    loop may need one of them, an import's, to close its connections.
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
    """Work on items in their order, at most so many at once; the first error ends all of it."""
    left = iter(items)

    async def worker() -> None:
        for item in left:  # shared: each item is one worker's
            await work(item)

    tasks = [asyncio.ensure_future(worker()) for _ in range(places)]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
