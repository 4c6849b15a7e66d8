"""Memory that was freed is given back, and not all the time."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from ensemble_rm.server import scheduling
from ensemble_rm.server.scheduling import MemoryRelease

BLOCK, BLOCKS = 100_000, 2000  # bytes; below what glibc maps by itself, 200 MB in all


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(scheduling._find_trim() is None, reason="another C library than glibc")
def test_what_lies_between_blocks_in_use_is_given_back() -> None:
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    c.free.argtypes = [ctypes.c_void_p]
    blocks = [c.malloc(BLOCK) for _ in range(BLOCKS)]
    kept = set(blocks[99::100])
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in set(blocks) - kept:
        c.free(block)
    held = resident()
    MemoryRelease(0.0)()
    assert held - resident() > 0.5 * BLOCK * BLOCKS
    for block in kept:
        c.free(block)


def test_it_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    trimmed: list[int] = []
    monkeypatch.setattr(scheduling, "monotonic", lambda: now)
    monkeypatch.setattr(scheduling, "_find_trim", lambda: trimmed.append)
    trim = MemoryRelease(10.0)
    for later in (3.0, 9.0, 10.0, 11.0, 19.9, 20.0, 90.0, 91.0):
        now = later
        trim()
    assert len(trimmed) == 3


def test_without_the_call_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling.sys, "platform", "win32")
    assert scheduling._find_trim() is None
    MemoryRelease(0.0)()
