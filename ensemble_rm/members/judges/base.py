"""A judge with one rubric: the base of `JudgeScorer` and `JudgeComparator`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ensemble_rm.errors import OptionError
from ensemble_rm.members.judges.asking import Judge, JudgeOptions, Messages, Reply
from ensemble_rm.members.judges.rubric import Rubric, read_rubric
from ensemble_rm.members.judges.usage import Usage
from ensemble_rm.members.remote.address import Token
from ensemble_rm.members.remote.loop_thread import Pending

T = TypeVar("T")


class RubricJudge:
    """Asks a judge by a rubric of its own kind.

    Parameters
    ----------
    url : str
        Of an OpenAI-compatible server.
    model : str
        Name of the judge on that server.
    rubric : str, Path, mapping or Rubric, optional
        The question (default: the rubric of the same name as its kind).
    token : str or callable, optional
        Bearer token, or a function that returns the current one.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network, in tests and for proxies.
    **options : Any
        The other fields of `JudgeOptions`.

    Raises
    ------
    OptionError
        If an option cannot be used, or the rubric is of the other kind.
    MissingExtraError
        If httpx is not installed.
    """

    wants: str
    """The kind of rubric, and the name of the usual one."""

    def __init__(
        self,
        url: str,
        *,
        model: str,
        rubric: str | Path | Mapping[str, Any] | Rubric | None = None,
        token: Token | None = None,
        transport: Any = None,
        **options: Any,
    ) -> None:
        self.rubric = read_rubric(self.wants if rubric is None else rubric)
        if self.rubric.kind != self.wants:
            raise OptionError(
                f"{type(self).__name__} needs a {self.wants} rubric, and {self.rubric.name} is "
                f"{self.rubric.kind}"
            )
        self.judge_options = JudgeOptions(url=url, model=model, **options)
        self._judge = Judge(self.judge_options, token=token, transport=transport)

    def close(self) -> None:
        """Close the connections; the next question opens new ones."""
        self._judge.close()

    def _begin(
        self, questions: Sequence[Messages], read: Callable[[tuple[list[Reply], Usage]], T]
    ) -> Pending[T]:
        return self._judge.begin(questions, read, max_tokens=self.rubric.max_tokens)
