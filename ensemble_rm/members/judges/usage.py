"""Usage of a judge: requests, tokens, cost, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ensemble_rm.errors import OptionError


@dataclass(frozen=True, slots=True)
class Price:
    """Price of a judge's tokens, per million tokens, in any currency.

    Attributes
    ----------
    prompt, completion : float
        Of the question's and of the reply's tokens; ≥ 0.
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        if not (self.prompt >= 0 and self.completion >= 0):
            raise OptionError(f"prices must be ≥ 0 per million tokens, not {self}")


@dataclass(frozen=True, slots=True)
class Usage:
    """Requests to a judge and their tokens, cost and time.

    Attributes
    ----------
    calls : int
        Requests whose reply was read; a comparison takes two.
    failed : int
        Requests that were rejected or cancelled, or whose reply could not be read. A reply counts
        with its tokens and cost even if it could not be read.
    prompt_tokens, completion_tokens : int
        As the server counts them.
    seconds : float
        Sum of the latencies of all requests, including retries and pauses. Requests run
        concurrently, so this is more than the elapsed time.
    cost : float, optional
        In the price's currency; None without a price.
    unreached : int
        Questions that the server never got: it was unreachable, or they were cancelled before.
    """

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float | None = None
    unreached: int = 0

    @property
    def latency(self) -> float:
        """Mean seconds per request; NaN without requests."""
        requests = self.calls + self.failed
        return self.seconds / requests if requests else float("nan")

    def __add__(self, other: Usage) -> Usage:
        """Return the sum; its cost is None if either has requests without a price."""
        costs = [usage.cost for usage in (self, other) if usage.calls or usage.cost is not None]
        return Usage(
            self.calls + other.calls,
            self.failed + other.failed,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.seconds + other.seconds,
            None if not costs or None in costs else sum(c for c in costs if c is not None),
            self.unreached + other.unreached,
        )

    def with_read(self, replies: int) -> Usage:
        """Return the same usage with `replies` requests as read and all others as failed."""
        return replace(self, calls=replies, failed=self.calls + self.failed - replies)

    def to_json(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "calls": self.calls,
            "failed": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": self.seconds,
            "cost": self.cost,
            "unreached": self.unreached,
        }


def read_usage(response: Mapping[str, Any], seconds: float, price: Price | None) -> Usage:
    """Return the usage of one request; token counts are 0 if the server reports none."""
    usage = response.get("usage")
    # Servers are not trusted: a count that is not a whole number in range counts as 0.
    counts = [
        value if type(value) is int and 0 <= value < 2**63 else 0
        for value in (
            (usage.get("prompt_tokens"), usage.get("completion_tokens"))
            if isinstance(usage, Mapping)
            else (0, 0)
        )
    ]
    cost = None
    if price is not None:
        cost = (counts[0] * price.prompt + counts[1] * price.completion) / 1e6
    return Usage(1, 0, counts[0], counts[1], seconds, cost)
