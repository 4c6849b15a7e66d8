"""A thread that an event loop hands calls to, and that keeps no process from ending.

`concurrent.futures` and `asyncio.to_thread` wait for their threads when the process ends; a call
that waits for another server can take minutes. Knows threads and loops; knows nothing of calls.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
_Call: TypeAlias = "tuple[Future[Any], Callable[[], Any]]"


class CallThread:
    """Makes calls one after the other in a daemon thread of its own, which starts at the first.

    Parameters
    ----------
    name : str
        The thread's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy = False
        """Whether a call goes on."""

    async def run(self, call: Callable[[], T]) -> T:
        """Return what a call returns; what it raises that is no `Exception` is a `RuntimeError`.

        To cancel it is to give it up: a call that goes on already goes on, for nobody.
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
        """Let the thread end behind the calls that it has; another call would start a new one."""
        self._calls.put(None)
        self._calls, self._thread = SimpleQueue(), None

    def _work(self, calls: SimpleQueue[_Call | None]) -> None:
        while (given := calls.get()) is not None:
            self.busy = True
            _settle(*given)
            self.busy = False
            del given  # an idle thread holds nothing


def as_failure(error: BaseException) -> RuntimeError:
    """Return the failure of a call that raised no `Exception`, such as a panic in Rust.

    Event loops take anything else than an `Exception` as an order to end.
    """
    found = RuntimeError(f"the call raised {type(error).__name__}").with_traceback(
        error.__traceback__
    )
    found.__cause__ = error
    return found


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        found = call()
    except Exception as error:  # noqa: BLE001 - whoever waits for it raises it
        future.set_exception(error)
    except BaseException as error:  # noqa: BLE001 - a panic in Rust is one
        future.set_exception(as_failure(error))
    else:
        future.set_result(found)
    finally:
        del future, call  # an error's frames would hold the future that holds the error
