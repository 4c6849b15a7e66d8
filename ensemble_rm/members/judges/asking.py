"""Sends a judge many questions at once, and returns each reply or its error, in their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeAlias, TypeVar

from ensemble_rm.errors import (
    OptionError,
    RemoteAnswerError,
    RemoteError,
    RemoteUnavailableError,
)
from ensemble_rm.members.judges.usage import Price, Usage, read_usage
from ensemble_rm.members.remote.address import Token, bearer, check_url, endpoint
from ensemble_rm.members.remote.client import ClientOptions, RejectedError, RemoteClient
from ensemble_rm.members.remote.loop_thread import LoopThread, Pending, work_through

T = TypeVar("T")
Messages: TypeAlias = list[dict[str, str]]
Reply: TypeAlias = Mapping[str, Any] | RemoteError
"""One choice of a chat completion, or why there is none."""

_TOP = 20  # log-probabilities that OpenAI and vLLM name at most, by default


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Which judge is asked, and how; saved with what uses it, and so without a token.

    Attributes
    ----------
    url : str
        Of an OpenAI-compatible server, such as ``http://localhost:8000/v1``.
    model : str
        The judge's name there.
    logprobs : bool
        Whether log-probabilities are asked for; a server that refuses them is asked without.
    extra : mapping of str to JSON values
        Further fields of the request, which replace those of the same name; None omits a field, as
        ``{"max_tokens": None, "max_completion_tokens": 16}`` does.
    price : Price, optional
        Of its tokens.
    client : ClientOptions
        Tries, pauses, deadline, concurrency, circuit.
    token_variable : str, optional
        The environment variable in which the command line finds the token.
    """

    url: str
    model: str
    logprobs: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    price: Price | None = None
    client: ClientOptions = field(default_factory=ClientOptions)
    token_variable: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", check_url(self.url))
        if not self.model:
            raise OptionError("a judge needs the name of its model")

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self) | {"extra": dict(self.extra)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        price = stored["price"]
        options = dict(stored) | {
            "client": ClientOptions(**stored["client"]),
            "price": None if price is None else Price(**price),
        }
        return cls(**options)


class Judge:
    """A connection to a judge; counts what all its questions take.

    Parameters
    ----------
    options : JudgeOptions
    token : str or callable, optional
        Bearer token, or a function that returns the current one.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network, in tests and for proxies.
    clock : callable
        Seconds that only grow.
    """

    def __init__(
        self,
        options: JudgeOptions,
        *,
        token: Token | None = None,
        transport: Any = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if isinstance(token, str):
            bearer(token)  # refused before the first request
        self.options, self.token, self.transport = options, token, transport
        self._clock = clock
        self._url = endpoint(options.url, "/chat/completions")
        self._client = RemoteClient(options.client, token=token, transport=transport)
        self._thread = LoopThread(self._client.aclose)
        self._offers_logprobs = options.logprobs
        self.usage = Usage()
        """What all questions took, including cancelled ones; written by the loop."""

    def begin(
        self,
        questions: Sequence[Messages],
        read: Callable[[tuple[list[Reply], Usage]], T],
        *,
        max_tokens: int,
    ) -> Pending[T]:
        """Ask; what is read is a reply a question, in their order, and what they took.

        Raises
        ------
        RemoteUnavailableError
            If the server could not be reached for any question.
        RemoteRefusalError
            If it refuses the address, the token or the model.
        """
        return self._thread.begin(self._all(questions, max_tokens), read)

    def close(self) -> None:
        """Close the connections; the next question opens new ones."""
        self._thread.close()

    async def _all(
        self, questions: Sequence[Messages], max_tokens: int
    ) -> tuple[list[Reply], Usage]:
        replies: list[Reply] = [{}] * len(questions)
        usages = [Usage(unreached=1)] * len(questions)
        outages: list[RemoteUnavailableError] = []

        async def one(i: int) -> None:
            if outages:  # who waited for the whole deadline waited for all
                replies[i] = outages[0]
                return
            began = self._clock()
            usages[i] = Usage(failed=1)  # in case it is cancelled on the way
            try:
                answer = await self._post(questions[i], max_tokens)
            except RemoteUnavailableError as error:
                outages.append(error)
                replies[i], usages[i] = error, Usage(unreached=1)
                return
            except (RejectedError, RemoteAnswerError) as error:
                replies[i] = error
                usages[i] = Usage(failed=1, seconds=self._clock() - began)
                return
            # Whether it can be read or not, it is paid for.
            usages[i] = read_usage(answer, self._clock() - began, self.options.price)
            replies[i] = _choice(answer)

        try:
            await work_through(range(len(questions)), one, places=self.options.client.concurrency)
        finally:
            taken = sum(usages, Usage())
            self.usage += taken
        if outages and all(isinstance(reply, Exception) for reply in replies):
            raise outages[0]
        return replies, taken

    async def _post(self, messages: Messages, max_tokens: int) -> Mapping[str, Any]:
        asked = self._offers_logprobs
        try:
            body = self._body(messages, max_tokens, logprobs=asked)
            answer = await self._client.post(self._url, body)
        except RejectedError as error:
            if not asked or "logprob" not in error.said:
                raise
            body = self._body(messages, max_tokens, logprobs=False)
            answer = await self._client.post(self._url, body)
            # The error may only have quoted the question; but without them it was answered.
            self._offers_logprobs = False
        if not isinstance(answer, Mapping):
            raise RemoteAnswerError(f"the judge's answer is {type(answer).__name__}, not an object")
        return answer

    def _body(self, messages: Messages, max_tokens: int, *, logprobs: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.options.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": _TOP}
        body |= self.options.extra
        return {name: value for name, value in body.items() if value is not None}


def _choice(answer: Mapping[str, Any]) -> Reply:
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        stored = f"the judge's answer holds no single choice: {str(answer)[:120]}"
        return RemoteAnswerError(stored)
    return choices[0]
