"""Sends questions to a judge concurrently and returns a reply or an error for each, in order."""

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
from ensemble_rm.saved_json import from_row

T = TypeVar("T")
Messages: TypeAlias = list[dict[str, str]]
Reply: TypeAlias = Mapping[str, Any] | RemoteError
"""The only choice of a chat completion, or the reason why there is none."""

_TOP = 20  # the most log-probabilities that OpenAI and, by default, vLLM return per token


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """A judge's address, model and request options; saved, and therefore without a token.

    Attributes
    ----------
    url : str
        Address of an OpenAI-compatible server, such as ``http://localhost:8000/v1``.
    model : str
        Name of the judge on that server.
    logprobs : bool
        Whether to request log-probabilities; if the server refuses them, requests omit them.
    extra : mapping of str to JSON values
        Fields that are added to the request or replace its own; None removes a field, as in
        ``{"max_tokens": None, "max_completion_tokens": 16}``.
    price : Price, optional
        Price of the judge's tokens.
    client : ClientOptions
        Attempts, pauses, deadline, concurrency, circuit breaker.
    """

    url: str
    model: str
    logprobs: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    price: Price | None = None
    client: ClientOptions = field(default_factory=ClientOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", check_url(self.url))
        if not self.model:
            raise OptionError("`model` is empty; name the judge's model on the server")

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values; `from_json` reads them."""
        return asdict(self) | {"extra": dict(self.extra)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote, else `SchemaError`."""
        return from_row(cls, stored)


class Judge:
    """A connection to a judge; sums the usage of all questions.

    Parameters
    ----------
    options : JudgeOptions
    token : str or callable, optional
        Bearer token, or a function that returns the current one.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network, in tests and for proxies.
    clock : callable
        Returns monotonic time in seconds.
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
            bearer(token)  # an invalid token fails here, not at the first request
        self.options, self.token, self.transport = options, token, transport
        self._clock = clock
        self._url = endpoint(options.url, "/chat/completions")
        self._client = RemoteClient(options.client, token=token, transport=transport)
        self._thread = LoopThread(self._client.aclose)
        self._offers_logprobs = options.logprobs
        self.usage = Usage()
        """Usage of all questions, cancelled ones included; written in the loop's thread."""

    def begin(
        self,
        questions: Sequence[Messages],
        read: Callable[[tuple[list[Reply], Usage]], T],
        *,
        max_tokens: int,
    ) -> Pending[T]:
        """Send questions; `read` gets the replies, one per question in order, and their usage.

        Raises
        ------
        RemoteUnavailableError
            If the server could not be reached for any question.
        RemoteRefusalError
            If the server refuses the address, the token or the model.
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

        async def send(i: int) -> None:
            # After one question has waited for the whole deadline, the others do not wait again.
            if outages:
                replies[i] = outages[0]
                return
            began = self._clock()
            usages[i] = Usage(failed=1)  # counts if the request is cancelled
            try:
                response = await self._post(questions[i], max_tokens)
            except RemoteUnavailableError as error:
                outages.append(error)
                replies[i], usages[i] = error, Usage(unreached=1)
                return
            except (RejectedError, RemoteAnswerError) as error:
                replies[i] = error
                usages[i] = Usage(failed=1, seconds=self._clock() - began)
                return
            # A reply costs its tokens even if no verdict can be read from it.
            usages[i] = read_usage(response, self._clock() - began, self.options.price)
            replies[i] = _choice(response)

        try:
            await work_through(range(len(questions)), send, places=self.options.client.concurrency)
        finally:
            usage = sum(usages, Usage())
            self.usage += usage
        if outages and all(isinstance(reply, Exception) for reply in replies):
            raise outages[0]
        return replies, usage

    async def _post(self, messages: Messages, max_tokens: int) -> Mapping[str, Any]:
        logprobs = self._offers_logprobs
        try:
            body = self._body(messages, max_tokens, logprobs=logprobs)
            response = await self._client.post(self._url, body)
        except RejectedError as error:
            if not logprobs or "logprob" not in error.body:
                raise
            body = self._body(messages, max_tokens, logprobs=False)
            response = await self._client.post(self._url, body)
            # Only now: the error may merely have quoted a question that contains "logprob".
            self._offers_logprobs = False
        if not isinstance(response, Mapping):
            raise RemoteAnswerError(
                f"the judge's response is {type(response).__name__}, not an object"
            )
        return response

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


def _choice(response: Mapping[str, Any]) -> Reply:
    choices = response.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        return RemoteAnswerError(
            f"the judge's response does not contain exactly one choice: {str(response)[:120]}"
        )
    return choices[0]
