"""Memory that the C library keeps of what was freed, given back to the machine.

Batches of ever other shapes leave pieces between them that glibc keeps for itself: after minutes of
scoring, a fifth of what the process holds. Knows nothing of what uses it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from time import monotonic


def _find_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim; None with another library."""
    if sys.platform != "linux":
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


class Trimmer:
    """Gives freed memory back, now and then.

    Parameters
    ----------
    every : float
        Seconds between two times; each takes milliseconds.
    """

    def __init__(self, every: float) -> None:
        self._every, self._last = every, monotonic()
        self._trim = _find_trim()

    def __call__(self) -> None:
        """Give back what is free, where the last time is long ago."""
        if self._trim is not None and monotonic() - self._last >= self._every:
            self._trim(0)
            self._last = monotonic()
