"""A judge that is asked by one rubric: what a scorer and a comparator have in common."""

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
        The judge's name there.
    rubric : str, Path, mapping or Rubric, optional
        What is asked; by default the rubric that is named as its kind.
    token : str or callable, optional
        A bearer token, or what returns the one that holds now.
    transport : httpx.AsyncBaseTransport, optional
        In the place of the network.
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
