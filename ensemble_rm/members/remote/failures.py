"""Why a sample has no score: whole for whom asked, and as a kind for logs.

A server's error and a judge's reply may quote the sample, so that no warning repeats them. Knows
words; knows nothing of servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self


class Reason(str):
    """Why there is no score.

    Attributes
    ----------
    kind : str
        The same in few words that quote nobody: an error's name, a status.
    """

    __slots__ = ("kind",)
    kind: str

    def __new__(cls, text: str, *, kind: str = "") -> Self:  # copies set it afterwards
        """Make one of its text and kind."""
        found = super().__new__(cls, text)
        found.kind = kind
        return found

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Return an error's message, with its kind: its own, or its name."""
        return cls(str(error), kind=getattr(error, "kind", type(error).__name__))


def count_failures(reasons: Sequence[str], n: int, *, what: str, where: str, else_: str) -> str:
    """Say how many of `n` samples failed, and the first one's kind.

    Parameters
    ----------
    reasons : sequence of str
        One or more.
    n : int
        Samples in all.
    what, where : str
        What they lack, and of whom.
    else_ : str
        The kind of a reason that has none: an answer that was read, and is no score.
    """
    kind = reasons[0].kind if isinstance(reasons[0], Reason) else else_
    return f"{len(reasons)} of {n} samples have no {what} of {where}; the first: {kind}"
