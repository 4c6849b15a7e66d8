"""An httpx client that posts JSON to one server, with retries, a deadline and a circuit breaker.

Must not know scores or the content of requests.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ensemble_rm.errors import (
    MissingExtraError,
    OptionError,
    RemoteAnswerError,
    RemoteError,
    RemoteRefusalError,
    RemoteUnavailableError,
)
from ensemble_rm.members.remote.address import Token, bearer
from ensemble_rm.members.remote.breaker import Breaker
from ensemble_rm.members.remote.retries import Outcome, outcome_of, pause, retry_after

_SHOWN = 200  # characters of a response that an error message shows
_LEAST = 0.01  # share of the deadline: no attempt starts with less time left


class RejectedError(RemoteError):
    """The server rejects this request but may accept others; the caller decides what follows.

    Attributes
    ----------
    kind : str
        The status, without the server's text.
    body : str
        The server's text.
    """

    def __init__(self, message: str, kind: str, body: str = "") -> None:
        super().__init__(message, kind, body)  # pickle and copy rebuild an exception from `args`
        self.kind, self.body = kind, body

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Timeouts, retries and concurrency of requests to one server.

    Attributes
    ----------
    timeout : float
        Seconds of one attempt.
    deadline : float
        Seconds of a request with all its attempts and pauses. While a request waits because
        `concurrency` others are in progress, each response to one of them restarts its deadline.
    attempts : int
        Maximum attempts of a request that times out or gets a server error. If the server is
        unreachable or busy, the request is repeated until the deadline.
    backoff, max_backoff : float
        Seconds; the pause before attempt n + 1 is random, up to min(max_backoff, backoff·2ⁿ).
    concurrency : int
        Maximum concurrent requests, and connections.
    open_after : int
        Consecutive failures that open the circuit, which stops requests for a while.
    reset_after : float
        Seconds until one request probes whether the server is back.
    seed : int, optional
        Seed of the pauses (default: the system's entropy).

    Raises
    ------
    OptionError
        If a number is out of its range.
    """

    timeout: float = field(default=60.0, metadata={"help": "seconds of one attempt"})
    deadline: float = field(
        default=300.0, metadata={"help": "seconds of a request with all its attempts and pauses"}
    )
    attempts: int = field(
        default=5,
        metadata={
            "help": "maximum attempts of a request that the server fails or does not answer in time"
        },
    )
    backoff: float = field(
        default=0.25,
        metadata={"help": "seconds of the longest first pause between attempts; it doubles"},
    )
    max_backoff: float = field(
        default=10.0, metadata={"help": "seconds of the longest pause between attempts"}
    )
    concurrency: int = field(default=8, metadata={"help": "maximum concurrent requests"})
    open_after: int = field(
        default=10, metadata={"help": "failures in a row after which requests stop for a while"}
    )
    reset_after: float = field(
        default=2.0,
        metadata={"help": "seconds after which one request checks whether the server is back"},
    )
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("timeout", "deadline", "backoff", "max_backoff", "reset_after"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name} must be a finite number of seconds > 0, not {value!r}")
        for name in ("attempts", "concurrency", "open_after"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a whole number ≥ 1, not {value!r}")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Result of one attempt."""

    outcome: Outcome
    reason: str
    kind: str = ""
    body: str = ""
    data: Any = None
    wait: float = 0.0


class RemoteClient:
    """Posts JSON to one server; all requests share connections and a circuit breaker.

    To be used from one event loop; the first request opens the connections. A forked child opens
    its own connections and starts with a closed circuit.

    Parameters
    ----------
    options : ClientOptions
    token : str or callable, optional
        Bearer token, or a function that returns it, called at every attempt.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network: a proxy, own certificates, a test. A forked child shares it.
    clock : callable
        Returns monotonic time in seconds.
    sleep : callable
        Takes seconds, returns an awaitable.

    Raises
    ------
    MissingExtraError
        If httpx is not installed.
    """

    def __init__(
        self,
        options: ClientOptions,
        *,
        token: Token | None = None,
        transport: Any = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        require_httpx()
        self.options = options
        self._token, self._transport = token, transport
        self._clock, self._sleep = clock, sleep
        self._reset()

    def _reset(self) -> None:
        """Start in this process with no connection; a parent's connections stay open there."""
        options = self.options
        self._process = os.getpid()
        self.breaker = Breaker(options.open_after, options.reset_after, clock=self._clock)
        self._generator = random.Random(options.seed)
        self._http: Any = None
        self._slots: asyncio.Semaphore | None = None

    async def post(self, url: str, body: Mapping[str, Any], *, attempts: int | None = None) -> Any:
        """Post JSON and return the JSON of the response.

        Parameters
        ----------
        url : str
        body : mapping of str to JSON values
        attempts : int, optional
            Replaces the options' `attempts`.

        Raises
        ------
        RejectedError
            If the server rejects this request, or every attempt ends in a server error.
        RemoteUnavailableError
            If there was no response before the deadline, or within `timeout` at the last attempt.
        RemoteRefusalError
            If the server refuses all requests, such as for a wrong address or token.
        RemoteAnswerError
            If the response is not valid JSON.
        """
        self._open()
        assert self._slots is not None
        began = self._clock()
        async with self._slots:
            # While the server answers other requests, waiting for a slot is not its fault: the
            # deadline counts from its last response.
            end = max(began, self.breaker.answered) + self.options.deadline
            return await self._retry(url, body, end, attempts or self.options.attempts)

    async def aclose(self) -> None:
        """Close the connections; the next request opens new ones."""
        if self._process != os.getpid():
            self._reset()
        http, self._http, self._slots = self._http, None, None
        if http is not None:
            await http.aclose()

    async def _retry(self, url: str, body: Mapping[str, Any], end: float, attempts: int) -> Any:
        """Post until a response is final, `attempts` are used up, or the time `end` is reached."""
        content = json.dumps(body, ensure_ascii=True, allow_nan=False).encode()
        request = object()  # identifies this request to the breaker
        failed, errors, last = 0, 0, "it answered no other request either"
        self._left(end, url, last)
        while True:
            wait = self.breaker.admit(request)
            if wait > 0 and await self._wait(wait, end, url, last):
                continue
            # Here the circuit is closed, or it stays open beyond the deadline: then one attempt
            # is made all the same, since there is nothing to lose.
            result = await self._attempt(url, content, end, request)
            if result.outcome is Outcome.DONE:
                self.breaker.succeeded()
                return result.data
            if result.outcome is Outcome.REFUSED:
                self.breaker.succeeded()
                raise RemoteRefusalError(f"{url} refuses: {result.reason}")
            self._report(result.outcome, request)
            errors += result.outcome in (Outcome.SERVER_ERROR, Outcome.TIMEOUT)
            if result.outcome is Outcome.TIMEOUT and errors >= attempts:
                raise RemoteUnavailableError(
                    f"no response from {url} in {errors} attempts: {result.reason}; raise "
                    "`timeout`, or send smaller requests"
                )
            if result.outcome is Outcome.REJECTED or errors >= attempts:
                raise RejectedError(result.reason, result.kind, result.body)
            last = result.reason
            wait = pause(
                failed,
                backoff=self.options.backoff,
                max_backoff=self.options.max_backoff,
                generator=self._generator,
            )
            failed += 1
            await self._wait(wait, end, url, last, minimum=result.wait)

    async def _wait(
        self, seconds: float, end: float, url: str, last: str, *, minimum: float = 0.0
    ) -> bool:
        """Wait `minimum` seconds, which the server asked for, and `seconds` more.

        A pause of our own is shortened where it would leave less than a quarter of the remaining
        time to another attempt: the server may come back until the last moment.

        Returns
        -------
        bool
            False if the pause was shortened.
        """
        left = self._left(end - minimum, url, last)
        complete = seconds <= 0.75 * left
        if not complete:
            seconds = self._generator.uniform(0.25, 0.75) * left
        await self._sleep(minimum + seconds)
        return complete

    def _left(self, end: float, url: str, last: str) -> float:
        """Return the seconds until `end`; raise if they do not suffice for another attempt."""
        left = end - self._clock()
        if left <= _LEAST * self.options.deadline:
            raise RemoteUnavailableError(
                f"no response from {url} within {self.options.deadline:g} s: {last}; start the "
                "server, or raise `deadline`"
            )
        return left

    def _report(self, outcome: Outcome, request: object) -> None:
        """Report a failed attempt to the breaker.

        A server error opens the circuit only where it is the probe's: it may be about this sample
        alone, and samples that the model cannot read must not stop all others.
        """
        if outcome in (Outcome.UNREACHABLE, Outcome.TIMEOUT):
            self.breaker.failed(request)
        elif outcome is Outcome.SERVER_ERROR:
            self.breaker.broken(request)
        else:
            self.breaker.succeeded()

    async def _attempt(self, url: str, content: bytes, end: float, request: object) -> _Attempt:
        """Send once; an attempt that is cancelled, or raises, says nothing about the server."""
        try:
            return await self._send(url, content, min(self.options.timeout, end - self._clock()))
        except BaseException:
            self.breaker.abandoned(request)
            raise

    async def _send(self, url: str, content: bytes, timeout: float) -> _Attempt:
        import httpx

        headers = {"Content-Type": "application/json"} | bearer(self._token)
        try:
            # httpx's own timeout limits each read alone, not the request as a whole.
            async with asyncio.timeout(max(timeout, 1e-3)):
                response = await self._http.post(
                    url, content=content, headers=headers, timeout=None
                )
        except TimeoutError:
            return _Attempt(Outcome.TIMEOUT, f"no response within {timeout:.3g} s")
        except httpx.DecodingError as error:
            raise RemoteAnswerError(f"the response of {url} cannot be decoded: {error}") from error
        except httpx.UnsupportedProtocol as error:
            raise RemoteRefusalError(f"{url}: {error}") from error
        except httpx.TransportError as error:
            return _Attempt(Outcome.UNREACHABLE, f"{type(error).__name__}: {error}")
        outcome = outcome_of(response.status_code)
        if outcome is not Outcome.DONE:
            kind = f"status {response.status_code}"
            reason, wait = f"{kind}: {response.text[:_SHOWN]}", response.headers.get("Retry-After")
            return _Attempt(outcome, reason, kind, response.text, wait=retry_after(wait))
        try:
            return _Attempt(Outcome.DONE, "", data=response.json())
        except (ValueError, RecursionError) as error:  # deep nesting raises RecursionError
            raise RemoteAnswerError(
                f"the response of {url} is not valid JSON: {response.text[:_SHOWN]!r}"
            ) from error

    def _open(self) -> None:
        if self._process != os.getpid():
            self._reset()
        if self._http is None:
            import httpx

            size = self.options.concurrency
            self._http = httpx.AsyncClient(
                transport=self._transport,
                limits=httpx.Limits(max_connections=size, max_keepalive_connections=size),
                follow_redirects=False,  # the token is meant for this server alone
                trust_env=False,  # the library never reads the environment
            )
            self._slots = asyncio.Semaphore(size)


def require_httpx() -> None:
    """Raise `MissingExtraError` if httpx is not installed."""
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "members and judges on other servers need httpx: pip install 'ensemble-rm[remote]'"
        ) from error
