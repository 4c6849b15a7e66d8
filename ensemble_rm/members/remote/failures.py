"""Counts of failed samples for warnings: by the kind of the first error, never by its text.

A server's error and a judge's reply may quote a sample, and warnings end up in logs.
"""

from __future__ import annotations

from collections.abc import Iterable

from ensemble_rm.errors import RemoteAnswerError


def failure_kind(error: Exception, unreadable: str) -> str:
    """Return what a log may say of an error: its status, `unreadable` for an answer, or its name.

    Parameters
    ----------
    error : Exception
    unreadable : str
        For an answer that arrived and is not a score.
    """
    if isinstance(error, RemoteAnswerError):
        return unreadable
    return str(getattr(error, "kind", type(error).__name__))


def count_failures(
    errors: Iterable[Exception], n: int, *, what: str, where: str, unreadable: str
) -> str:
    """Return a sentence about the samples of `n` that failed, and the first one's kind.

    Parameters
    ----------
    errors : iterable of Exception
        One or more.
    n : int
        Samples in all.
    what, where : str
        What they lack, and of which member.
    unreadable : str
        The kind of an answer that arrived and is not a score.
    """
    failed = list(errors)
    kind = failure_kind(failed[0], unreadable)
    return f"{len(failed)} of {n} samples have no {what} of {where}; the first: {kind}"
