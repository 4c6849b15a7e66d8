"""What a failed try means, and how long to wait before the next.

Pure functions over status codes, headers and a generator; knows nothing of httpx or of scores.

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


class Meaning(Enum):
    """What an answer's status says of the next try."""

    DONE = "done"
    BUSY = "busy"  # the server lives, and asks for patience: until the deadline
    AWAY = "away"  # nobody answers, or only a proxy: until the deadline
    BROKEN = "broken"  # this request met an error inside: a stated number of tries
    SILENT = "silent"  # this try took too long: a stated number of tries
    REFUSED = "refused"  # every request would be refused alike: never again
    REJECTED = "rejected"  # this request would be refused again, another might not


_MEANINGS = (
    dict.fromkeys((429,), Meaning.BUSY)
    | dict.fromkeys((502, 503, 504), Meaning.AWAY)
    # 501: a vLLM whose model scores every token says so of /classify.
    | dict.fromkeys((401, 403, 404, 405, 407, 410, 415, 421, 426, 501), Meaning.REFUSED)
    # 408: the server tired of waiting. 424: text-embeddings-inference's own failure.
    | dict.fromkeys((408, 424, 425), Meaning.BROKEN)
)


def meaning(status: int) -> Meaning:
    """Return what a status code means for the next try."""
    if 200 <= status < 300:
        return Meaning.DONE
    if status in _MEANINGS:
        return _MEANINGS[status]
    if status >= 500:
        return Meaning.BROKEN
    return Meaning.REJECTED if status >= 400 else Meaning.REFUSED  # nor are redirects followed


def pause(attempt: int, *, backoff: float, max_backoff: float, generator: random.Random) -> float:
    """Return seconds before the next try: uniform in [0, min(max_backoff, backoff·2^attempt)] [1]_.

    Parameters
    ----------
    attempt : int
        Tries that failed before this one.
    backoff, max_backoff : float
        Seconds.
    generator : random.Random
        The client's own.
    """
    ceiling = min(max_backoff, backoff * 2.0 ** min(attempt, 60))
    return generator.uniform(0.0, ceiling)


def retry_after(value: str | None, *, now: datetime | None = None) -> float:
    """Read a Retry-After header, seconds or a date [2]_; 0 where there is none that can be read."""
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
