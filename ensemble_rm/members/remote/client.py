"""Posts JSON to one server, again where that can help, until a deadline: an httpx client.

Knows statuses, pauses and the circuit; knows nothing of scores or of what is posted.
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
from ensemble_rm.members.remote.retries import Meaning, meaning, pause, retry_after

_SHOWN = 200  # characters of an error's body that a message shows
_LEAST = 0.01  # of the deadline: with less left, no further try begins


class RejectedError(RemoteError):
    """A server rejects a request, and may accept another; the caller decides what it means.

    Attributes
    ----------
    kind : str
        The status, without the server's text.
    said : str
        The server's text.
    """

    def __init__(self, message: str, kind: str, said: str = "") -> None:
        super().__init__(message, kind, said)  # all arguments, so that a copy has them
        self.kind, self.said = kind, said

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """How a server is asked.

    Attributes
    ----------
    timeout : float
        Seconds that one try may take.
    deadline : float
        Seconds that a request may take with all its tries and pauses. While it waits for one of
        the places that `concurrency` sets, every answer to another request restarts them.
    attempts : int
        Tries of a request that meets errors inside the server or times out. One that finds nobody,
        or a busy server, is tried until the deadline.
    backoff, max_backoff : float
        Seconds; before try n + 1 it waits a random time up to min(max_backoff, backoff·2ⁿ).
    concurrency : int
        Requests, and connections, at once.
    open_after : int
        Consecutive failures that open the circuit: then no request is sent for a while.
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
class _Try:
    """What came of one try."""

    meaning: Meaning
    reason: str
    kind: str = ""
    said: str = ""
    data: Any = None
    wait: float = 0.0


class RemoteClient:
    """Posts to one server; every request shares its connections and its circuit.

    Used from one event loop, in which its first request opens the connections. A forked child has
    an event loop, connections and a circuit of its own.

    Parameters
    ----------
    options : ClientOptions
    token : str or callable, optional
        Sent as a bearer token; a callable is asked at every try.
    transport : httpx.AsyncBaseTransport, optional
        In the place of the network: a proxy, own certificates, a test. A forked child shares it.
    clock, sleep : callable
        Seconds that only grow, and what waits for some.

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
        self._begin()

    def _begin(self) -> None:
        """Begin in this process, with nothing open; what a parent has open stays open there."""
        options = self.options
        self._process = os.getpid()
        self.breaker = Breaker(options.open_after, options.reset_after, clock=self._clock)
        self._generator = random.Random(options.seed)
        self._http: Any = None
        self._places: asyncio.Semaphore | None = None

    async def post(self, url: str, body: Mapping[str, Any], *, attempts: int | None = None) -> Any:
        """Return the JSON that the server answers.

        Parameters
        ----------
        url : str
        body : mapping of str to JSON values
        attempts : int, optional
            In the place of the options' own.

        Raises
        ------
        RejectedError
            If this request is rejected, or met errors inside the server at every try.
        RemoteUnavailableError
            If there was no response before the deadline, or within `timeout` at the last attempt.
        RemoteRefusalError
            If the server refuses whatever is asked.
        RemoteAnswerError
            If the response is not valid JSON.
        """
        self._open()
        assert self._places is not None
        began = self._clock()
        async with self._places:
            # Who waited while others were answered waited for a place; else for the server.
            end = max(began, self.breaker.answered) + self.options.deadline
            return await self._tried(url, body, end, attempts or self.options.attempts)

    async def aclose(self) -> None:
        """Close the connections; the next request opens new ones."""
        if self._process != os.getpid():
            self._begin()
        http, self._http, self._places = self._http, None, None
        if http is not None:
            await http.aclose()

    async def _tried(self, url: str, body: Mapping[str, Any], end: float, attempts: int) -> Any:
        content = json.dumps(body, ensure_ascii=True, allow_nan=False).encode()
        who, failed, broken, last = object(), 0, 0, "nor did it answer anybody else"
        self._left(end, url, last)
        while True:
            wait = self.breaker.admit(who)
            if wait > 0 and await self._wait(wait, end, url, last):
                continue  # else the circuit is open beyond the end, and there is time for a try
            found = await self._once(url, content, end, who)
            if found.meaning is Meaning.DONE:
                self.breaker.succeeded()
                return found.data
            if found.meaning is Meaning.REFUSED:
                self.breaker.succeeded()
                raise RemoteRefusalError(f"{url} refuses: {found.reason}")
            self._tell(found.meaning, who)
            broken += found.meaning in (Meaning.BROKEN, Meaning.SILENT)
            if found.meaning is Meaning.SILENT and broken >= attempts:
                raise RemoteUnavailableError(
                    f"{url} gave no score in {broken} tries: {found.reason}; raise `timeout`, or "
                    "send less at once"
                )
            if found.meaning is Meaning.REJECTED or broken >= attempts:
                raise RejectedError(found.reason, found.kind, found.said)
            last = found.reason
            wait = pause(
                failed,
                backoff=self.options.backoff,
                max_backoff=self.options.max_backoff,
                generator=self._generator,
            )
            failed += 1
            await self._wait(wait, end, url, last, asked=found.wait)

    async def _wait(
        self, seconds: float, end: float, url: str, last: str, *, asked: float = 0.0
    ) -> bool:
        """Wait; return whether it was for as long as we meant to.

        A server may come back until the last moment: what we chose to wait leaves at least a
        quarter of the time that is left to another try. What the server `asked` for is kept.
        """
        left = self._left(end - asked, url, last)
        whole = seconds <= 0.75 * left
        if not whole:
            seconds = self._generator.uniform(0.25, 0.75) * left
        await self._sleep(asked + seconds)
        return whole

    def _left(self, end: float, url: str, last: str) -> float:
        """Return the seconds that are left for tries; where hardly any are, give up."""
        left = end - self._clock()
        if left <= _LEAST * self.options.deadline:
            raise RemoteUnavailableError(
                f"{url} gave no score in {self.options.deadline:g} s: {last}; start the server, or "
                "raise `deadline`"
            )
        return left

    def _tell(self, means: Meaning, who: object) -> None:
        """Tell the breaker of a failed try.

        An error inside the server says something of the server only where it meets the probe: of
        many samples that the model cannot take, none must keep all others waiting.
        """
        if means in (Meaning.AWAY, Meaning.SILENT):
            self.breaker.failed(who)
        elif means is Meaning.BROKEN:
            self.breaker.broken(who)
        else:
            self.breaker.succeeded()

    async def _once(self, url: str, content: bytes, end: float, who: object) -> _Try:
        """Try once; one that is cancelled, or raises, tells nothing of the server."""
        try:
            return await self._send(url, content, min(self.options.timeout, end - self._clock()))
        except BaseException:
            self.breaker.abandoned(who)
            raise

    async def _send(self, url: str, content: bytes, timeout: float) -> _Try:
        import httpx

        headers = {"Content-Type": "application/json"} | bearer(self._token)
        try:
            async with asyncio.timeout(max(timeout, 1e-3)):  # httpx limits each read alone
                answer = await self._http.post(url, content=content, headers=headers, timeout=None)
        except TimeoutError:
            return _Try(Meaning.SILENT, f"no answer in {timeout:.3g} s")
        except httpx.DecodingError as error:
            raise RemoteAnswerError(f"{url} answers what cannot be decoded: {error}") from error
        except httpx.UnsupportedProtocol as error:
            raise RemoteRefusalError(f"{url}: {error}") from error
        except httpx.TransportError as error:
            return _Try(Meaning.AWAY, f"{type(error).__name__}: {error}")
        means = meaning(answer.status_code)
        if means is not Meaning.DONE:
            kind = f"status {answer.status_code}"
            reason, wait = f"{kind}: {answer.text[:_SHOWN]}", answer.headers.get("Retry-After")
            return _Try(means, reason, kind, answer.text, wait=retry_after(wait))
        try:
            return _Try(Meaning.DONE, "", data=answer.json())
        except (ValueError, RecursionError) as error:  # the latter: nested too deep
            raise RemoteAnswerError(
                f"the response of {url} is not valid JSON: {answer.text[:_SHOWN]!r}"
            ) from error

    def _open(self) -> None:
        if self._process != os.getpid():
            self._begin()
        if self._http is None:
            import httpx

            size = self.options.concurrency
            self._http = httpx.AsyncClient(
                transport=self._transport,
                limits=httpx.Limits(max_connections=size, max_keepalive_connections=size),
                follow_redirects=False,  # a token is for this server alone
                trust_env=False,  # the library reads no environment
            )
            self._places = asyncio.Semaphore(size)


def require_httpx() -> None:
    """Raise `MissingExtraError` where httpx is not installed."""
    try:
        import httpx  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "members and judges behind HTTP need httpx: pip install 'ensemble-rm[remote]'"
        ) from error
