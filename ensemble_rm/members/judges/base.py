"""Base class of `JudgeScorer` and `JudgeComparator`: a judge and its rubric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ensemble_rm.errors import OptionError
from ensemble_rm.members.judges.asking import Judge, JudgeOptions, Messages, Reply
from ensemble_rm.members.judges.rubric import Rubric, read_rubric
from ensemble_rm.members.judges.usage import Price, Usage
from ensemble_rm.members.remote.address import Token
from ensemble_rm.members.remote.client import ClientOptions
from ensemble_rm.members.remote.loop_thread import Pending

T = TypeVar("T")


class RubricJudge:
    """Asks a judge the question of a rubric.

    Parameters
    ----------
    url : str
        Address of an OpenAI-compatible server.
    model : str
        Name of the judge on that server.
    rubric : str, Path, mapping or Rubric, optional
        The question (default: the rubric named like `wants`).
    logprobs : bool
        Whether to request log-probabilities; if the server refuses them, requests omit them.
    extra : mapping of str to JSON values, optional
        Fields that are added to the request or replace its own; None removes a field.
    price : Price, optional
        Price of the judge's tokens.
    client : ClientOptions, optional
        Attempts, pauses, deadline, concurrency, circuit breaker.
    token : str or callable, optional
        Bearer token, or a function that returns the current one.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network, in tests and for proxies.

    Raises
    ------
    OptionError
        If an option is invalid, or the rubric is of the other kind.
    MissingExtraError
        If httpx is not installed.
    """

    wants: str
    """Kind of the rubric, and name of the default rubric of that kind."""

    def __init__(
        self,
        url: str,
        *,
        model: str,
        rubric: str | Path | Mapping[str, Any] | Rubric | None = None,
        logprobs: bool = True,
        extra: Mapping[str, Any] | None = None,
        price: Price | None = None,
        client: ClientOptions | None = None,
        token: Token | None = None,
        transport: Any = None,
    ) -> None:
        self.rubric = read_rubric(self.wants if rubric is None else rubric)
        if self.rubric.kind != self.wants:
            raise OptionError(
                f"{type(self).__name__} needs a {self.wants} rubric; {self.rubric.name!r} is "
                f"{self.rubric.kind}"
            )
        self.judge_options = JudgeOptions(
            url=url,
            model=model,
            logprobs=logprobs,
            extra=extra or {},
            price=price,
            client=client or ClientOptions(),
        )
        self._judge = Judge(self.judge_options, token=token, transport=transport)

    def close(self) -> None:
        """Close the connections; the next question opens new ones."""
        self._judge.close()

    def _begin(
        self, questions: Sequence[Messages], read: Callable[[tuple[list[Reply], Usage]], T]
    ) -> Pending[T]:
        return self._judge.begin(questions, read, max_tokens=self.rubric.max_tokens)
