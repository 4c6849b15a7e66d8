"""A circuit breaker [1]_: stops requests to a server that keeps failing, then probes it.

An open circuit does not fail a request; it returns how long to wait. Only the request's deadline
ends it, so no score is lost if the server comes back in time.

References
----------
.. [1] Nygard 2007, Release It!
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

State: TypeAlias = Literal["closed", "open", "half-open"]

_POLLS = 4  # times per `reset_after` that a waiting request checks a probe in progress


class Breaker:
    """Counts consecutive failures of one server; shared by all requests of one event loop.

    Parameters
    ----------
    open_after : int
        Consecutive failures that open the circuit.
    reset_after : float
        Seconds until one request, the probe, may try again.
    clock : callable
        Returns monotonic time in seconds.

    Attributes
    ----------
    answered : float
        Time of the server's last response, by `clock`; −∞ before the first.
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
        """State of the circuit: closed sends all requests, open none, half-open one probe."""
        if self._opened is None:
            return "closed"
        return "half-open" if self._clock() - self._opened >= self.reset_after else "open"

    def admit(self, request: object) -> float:
        """Return 0 if `request` may be sent and must report back, else seconds to wait."""
        if self._opened is None:
            return 0.0
        left = self._opened + self.reset_after - self._clock()
        if left > 0:
            return left
        if self._probe is not None:
            return self.reset_after / _POLLS
        self._probe = request
        return 0.0

    def succeeded(self) -> None:
        """Report a response of the server: the circuit closes."""
        self.answered = self._clock()
        self._failures, self._opened, self._probe = 0, None, None

    def failed(self, request: object) -> None:
        """Report a failure: the probe's, or the `open_after`-th in a row, opens the circuit.

        A request that started before the circuit opened does not restart the waiting time.
        """
        self._failures += 1
        if self._probe is request or (self._opened is None and self._failures >= self.open_after):
            self._opened = self._clock()
        self.abandoned(request)

    def broken(self, request: object) -> None:
        """Report a server error: it counts as a failure only if `request` is the probe."""
        if self._probe is request:
            self.failed(request)

    def abandoned(self, request: object) -> None:
        """Report that an attempt was cancelled, which says nothing about the server."""
        if self._probe is request:
            self._probe = None
