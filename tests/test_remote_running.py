"""The event loop of a member: it ends with its owner, whoever finds that out."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading

from ensemble_rm.members.remote.running import LoopThread


async def _thread() -> threading.Thread:
    return threading.current_thread()


def test_a_collection_waits_for_nobody() -> None:
    """It may hold a lock, an import's, that the loop needs to close its connections."""
    lock, closed = threading.Lock(), threading.Event()

    async def closing() -> None:
        with lock:
            closed.set()

    owner = LoopThread(closing)
    thread = owner.run(_thread())
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
    thread = owners[0].run(_thread())

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
    first = owner.run(_thread())
    owner.close()
    assert closed == [first] and not first.is_alive()
    second = owner.run(_thread())
    assert second is not first
    owner.close()
    owner.close()
    assert closed == [first, second]


def test_the_exit_of_the_process_closes_what_is_open() -> None:
    code = """if True:
        import asyncio
        from ensemble_rm.members.remote.running import LoopThread

        async def closing():
            await asyncio.sleep(0.05)
            print("closed", flush=True)

        owner = LoopThread(closing)
        owner.run(asyncio.sleep(0))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "closed\n" and not done.stderr
