"""How long work says where it stands: one callable, and the one that says nothing.

Knows nothing of the work, nor of bars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (stage, done, total) as work goes on; a total of 0 is not known."""


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


def named(progress: Progress, part: str) -> Progress:
    """Return a progress callback whose stages end in the name of a part of the work."""
    return lambda stage, done, total: progress(f"{stage} {part}", done, total)
