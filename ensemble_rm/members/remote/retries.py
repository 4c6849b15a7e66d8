"""Which failed attempts are repeated, and the pause before the next one.

Pure functions of status codes, headers and a random generator, so that they are tested without a
server.

References
----------
.. [1] Brooker 2015, Exponential Backoff And Jitter (AWS Architecture Blog): full jitter.
.. [2] RFC 9110, sections 10.2.3 and 15.
"""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum


class Outcome(Enum):
    """Outcome of an attempt; it decides whether there is another one."""

    DONE = "done"
    BUSY = "busy"  # the server runs and asks to wait: retried until the deadline
    UNREACHABLE = "unreachable"  # no response, or only a proxy's: retried until the deadline
    SERVER_ERROR = "server error"  # retried `attempts` times
    TIMEOUT = "timeout"  # retried `attempts` times
    REFUSED = "refused"  # the server refuses every request of this kind: not retried
    REJECTED = "rejected"  # the server rejects this request alone: not retried


_OUTCOMES = (
    dict.fromkeys((429,), Outcome.BUSY)
    | dict.fromkeys((502, 503, 504), Outcome.UNREACHABLE)
    # 501: vLLM's /classify under a model that scores every token.
    | dict.fromkeys((401, 403, 404, 405, 407, 410, 415, 421, 426, 501), Outcome.REFUSED)
    # 408: the server timed out. 424: how text-embeddings-inference reports a failed inference.
    | dict.fromkeys((408, 424, 425), Outcome.SERVER_ERROR)
)


def outcome_of(status: int) -> Outcome:
    """Return the outcome that an HTTP status code stands for."""
    if 200 <= status < 300:
        return Outcome.DONE
    if status in _OUTCOMES:
        return _OUTCOMES[status]
    if status >= 500:
        return Outcome.SERVER_ERROR
    # Redirects are refused, not followed: the token is meant for this server alone.
    return Outcome.REJECTED if status >= 400 else Outcome.REFUSED


def pause(attempt: int, *, backoff: float, max_backoff: float, generator: random.Random) -> float:
    """Return the pause in seconds, uniform in [0, min(max_backoff, backoff·2^attempt)] [1]_.

    Parameters
    ----------
    attempt : int
        Number of attempts that failed before this one.
    backoff, max_backoff : float
        Seconds.
    generator : random.Random
        The client's own.
    """
    # The exponent is bounded, since 2.0 ** 1024 overflows.
    ceiling = min(max_backoff, backoff * 2.0 ** min(attempt, 60))
    return generator.uniform(0.0, ceiling)


def retry_after(value: str | None, *, now: datetime | None = None) -> float:
    """Return the seconds of a Retry-After header [2]_, number or date; 0 if none is valid."""
    if value is None:
        return 0.0
    text = value.strip()
    try:
        seconds = float(text) if text.isascii() and text[:1].isdigit() else _until(text, now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _until(text: str, now: datetime | None) -> float:
    when = parsedate_to_datetime(text)
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return (when - (now or datetime.now(UTC))).total_seconds()
