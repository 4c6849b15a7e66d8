"""What judgments cost: calls, tokens, money, time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ensemble_rm.errors import OptionError


@dataclass(frozen=True, slots=True)
class Price:
    """What a judge's tokens cost, in any currency, a million.

    Attributes
    ----------
    prompt, completion : float
        ≥ 0.
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        if not (self.prompt >= 0 and self.completion >= 0):
            raise OptionError(f"a price must be ≥ 0 a million tokens, not {self}")


@dataclass(frozen=True, slots=True)
class Usage:
    """What was asked of a judge, and what it took.

    Attributes
    ----------
    calls : int
        Requests whose reply could be read; a comparison is two.
    failed : int
        Other requests that the server rejected, or answered with something else; answers have
        their tokens and their price, too.
    prompt_tokens, completion_tokens : int
        As the server counts them.
    seconds : float
        Sum of the requests' latencies, tries and pauses included; they run side by side.
    cost : float, optional
        In the price's currency; None where no price is known.
    unreached : int
        Questions that took nothing: the server was out of reach, then or for one before, or it
        was not asked before all were given up.
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
        """Mean seconds a request; NaN where there was none."""
        asked = self.calls + self.failed
        return self.seconds / asked if asked else float("nan")

    def __add__(self, other: Usage) -> Usage:
        """Return both together; what one of them does not know the price of has none."""
        costs = [one.cost for one in (self, other) if one.calls or one.cost is not None]
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
        """Return the same where only so many replies could be read; the others have failed."""
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


def read_usage(answer: Mapping[str, Any], seconds: float, price: Price | None) -> Usage:
    """Return what one answered request took; a server that counts no tokens counts none."""
    said = answer.get("usage")
    counts = [
        value if type(value) is int and 0 <= value < 2**63 else 0
        for value in (
            (said.get("prompt_tokens"), said.get("completion_tokens"))
            if isinstance(said, Mapping)
            else (0, 0)
        )
    ]
    cost = None
    if price is not None:
        cost = (counts[0] * price.prompt + counts[1] * price.completion) / 1e6
    return Usage(1, 0, counts[0], counts[1], seconds, cost)
