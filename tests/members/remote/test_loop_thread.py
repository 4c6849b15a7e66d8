"""The event loop of a member: it ends with its owner, whoever finds that out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import Future, wait
from typing import Any

import pytest

from ensemble_rm.errors import RemoteUnavailableError
from ensemble_rm.members.remote.loop_thread import LoopThread


async def _thread() -> threading.Thread:
    return threading.current_thread()


def test_a_collection_waits_for_nobody() -> None:
    """It may hold a lock, an import's, that the loop needs to close its connections."""
    lock, closed = threading.Lock(), threading.Event()

    async def closing() -> None:
        with lock:
            closed.set()

    owner = LoopThread(closing)
    thread = owner.begin(_thread(), lambda found: found).result()
    with lock:
        del owner
        gc.collect()
        assert not closed.is_set()
    assert closed.wait(60)
    thread.join(60)
    assert not thread.is_alive()


def test_a_collection_in_the_loops_own_thread_ends_it() -> None:
    closed = threading.Event()

    async def closing() -> None:
        closed.set()

    owners = [LoopThread(closing)]
    thread = owners[0].begin(_thread(), lambda found: found).result()

    async def collect() -> None:
        owners.clear()
        gc.collect()

    loop = owners[0]._loop
    assert loop is not None
    asyncio.run_coroutine_threadsafe(collect(), loop).result(60)
    assert closed.wait(60)
    thread.join(60)
    assert not thread.is_alive() and loop.is_closed()


def test_close_waits_and_another_call_starts_anew() -> None:
    closed = []

    async def closing() -> None:
        await asyncio.sleep(0.01)
        closed.append(threading.current_thread())

    owner = LoopThread(closing)
    first = owner.begin(_thread(), lambda found: found).result()
    owner.close()
    assert closed == [first] and not first.is_alive()
    second = owner.begin(_thread(), lambda found: found).result()
    assert second is not first
    owner.close()
    owner.close()
    assert closed == [first, second]


def test_who_waits_while_another_closes_gets_a_named_error() -> None:
    """What is under way ends first, and then the connections that it may use."""
    begun, events = threading.Event(), []

    async def closing() -> None:
        events.append("closed")

    async def waits() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            events.append("ended")

    owner = LoopThread(closing)
    pending = owner.begin(waits(), lambda found: found)
    assert begun.wait(60)
    owner.close()
    assert events == ["ended", "closed"]
    with pytest.raises(RemoteUnavailableError, match="closed while"):
        pending.result()
    assert owner.begin(_thread(), lambda found: found).result().is_alive()
    owner.close()


def test_a_call_that_a_close_overtakes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding the loop and giving it the work, another thread closes."""

    async def closing() -> None:
        await asyncio.sleep(0)

    owner = LoopThread(closing)
    owner.begin(_thread(), lambda found: found).result()
    closers = [threading.Thread(target=owner.close)]
    give = asyncio.run_coroutine_threadsafe

    def overtaken(coroutine: Any, loop: asyncio.AbstractEventLoop) -> Future[Any]:
        if closers[0].ident is None:
            closers[0].start()
            closers[0].join(0.2)
        return give(coroutine, loop)

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", overtaken)
    pending = owner.begin(asyncio.sleep(0, "done"), lambda found: found)
    assert wait([pending._future], timeout=60).done
    with contextlib.suppress(RemoteUnavailableError):  # it may have been closed, by that name
        assert pending.result() == "done"
    closers[0].join(60)
    assert not closers[0].is_alive()
    assert owner.begin(asyncio.sleep(0, "again"), lambda found: found).result() == "again"
    owner.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_while_another_thread_begins_does_not_wait_for_it() -> None:
    async def closing() -> None:
        await asyncio.sleep(0)

    owner = LoopThread(closing)
    with owner._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        child = os.fork()
        if child == 0:
            os._exit(0 if owner._lock.acquire(blocking=False) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_exit_of_the_process_closes_what_is_open() -> None:
    code = """if True:
        import asyncio
        from ensemble_rm.members.remote.loop_thread import LoopThread

        async def closing():
            await asyncio.sleep(0.05)
            print("closed", flush=True)

        owner = LoopThread(closing)
        owner.begin(asyncio.sleep(0), lambda found: found).result()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "closed\n" and not done.stderr
