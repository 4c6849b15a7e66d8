"""A circuit breaker [1]_: a server that fails again and again is left alone, then asked once.

An open circuit does not fail a request: it says how long to wait. Whether that is too long is the
request's own deadline's business, so a server that comes back in time costs nobody a score.

References
----------
.. [1] Nygard 2007, Release It!
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

State: TypeAlias = Literal["closed", "open", "half-open"]

_POLLS = 4  # looks at a probe that is under way, a cool-down


class Breaker:
    """Counts failures in a row; belongs to one event loop, and is shared by all its requests.

    Parameters
    ----------
    open_after : int
        Failures in a row that open the circuit.
    reset_after : float
        Seconds until one request, the probe, may try again.
    clock : callable
        Seconds that only grow.

    Attributes
    ----------
    answered : float
        When the server answered last, by that clock; −∞ where it has not.
    """

    def __init__(self, open_after: int, reset_after: float, *, clock: Callable[[], float]) -> None:
        self.open_after, self.reset_after = open_after, reset_after
        self._clock = clock
        self.answered = -math.inf
        self._failures = 0
        self._opened: float | None = None
        self._probe: object | None = None

    @property
    def state(self) -> State:
        """Closed: all requests; open: none; half-open: one probe."""
        if self._opened is None:
            return "closed"
        return "half-open" if self._clock() - self._opened >= self.reset_after else "open"

    def admit(self, who: object) -> float:
        """Return 0 where `who` may try now, and must report; else seconds to wait."""
        if self._opened is None:
            return 0.0
        left = self._opened + self.reset_after - self._clock()
        if left > 0:
            return left
        if self._probe is not None:
            return self.reset_after / _POLLS
        self._probe = who
        return 0.0

    def succeeded(self) -> None:
        """Report that the server answered: the circuit closes."""
        self.answered = self._clock()
        self._failures, self._opened, self._probe = 0, None, None

    def failed(self, who: object) -> None:
        """Report a failure: the last of too many in a row, or the probe's, opens the circuit.

        One that began before the circuit opened changes nothing: the probe is still under way.
        """
        self._failures += 1
        if self._probe is who or (self._opened is None and self._failures >= self.open_after):
            self._opened = self._clock()
        self.abandoned(who)

    def broken(self, who: object) -> None:
        """Report an error inside the server: a failure where it is the probe's, else nothing."""
        if self._probe is who:
            self.failed(who)

    def abandoned(self, who: object) -> None:
        """Report that a try ended without telling anything of the server: it was cancelled."""
        if self._probe is who:
            self._probe = None
