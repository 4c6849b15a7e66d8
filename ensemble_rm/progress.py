"""Progress callbacks.

The library calls them; drawing a bar is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (stage, done, total) during long work; a total of 0 means that it is unknown."""


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


def named(progress: Progress, part: str) -> Progress:
    """Return a progress callback that appends a name to each stage."""
    return lambda stage, done, total: progress(f"{stage} {part}", done, total)
