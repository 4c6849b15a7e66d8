"""A judge model that rates one answer, as a member: its rating is the score."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import RemoteError, RemoteFailureWarning
from ensemble_rm.members.judges.asking import Judge, JudgeOptions, Messages, Reply
from ensemble_rm.members.judges.base import RubricJudge
from ensemble_rm.members.judges.replies import Rating, read_rating
from ensemble_rm.members.judges.rubric import Rubric
from ensemble_rm.members.judges.usage import Usage
from ensemble_rm.members.remote.address import Token
from ensemble_rm.members.remote.failures import count_failures
from ensemble_rm.members.remote.loop_thread import Pending
from ensemble_rm.members.remote.storage import StoredElsewhere
from ensemble_rm.members.scorer import MemberScores, Truncation
from ensemble_rm.progress import Progress, silent


class JudgeScorer(RubricJudge, StoredElsewhere):
    """Rates completions by asking a judge model; the rating is the raw score.

    The rating is the expectation over the ratings' tokens (Liu et al. 2023, arXiv 2303.16634)
    where the server offers log-probabilities, and the stated number where it does not, which
    makes ties. A reply that is no rating is NaN, by the aggregator's policy for missing members.

    Parameters
    ----------
    url : str
        Of an OpenAI-compatible server, such as ``http://localhost:8000/v1``; saved.
    model : str
        Name of the judge on that server.
    name : str
        Name of the column.
    rubric : str, Path, mapping or Rubric, optional
        What is asked: ``"pointwise"`` (default), a JSON file or its content; saved as it is.
    token : str or callable, optional
        Bearer token, or a function that returns the current one. Never saved.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network, in tests and for proxies.
    **options : Any
        The other fields of `JudgeOptions`.

    Attributes
    ----------
    usage : Usage
        What all scores of this member took, including those that were cancelled.

    Raises
    ------
    OptionError
        If an option or the rubric cannot be used.
    MissingExtraError
        If httpx is not installed.
    """

    kind = "judge"
    wants = "pointwise"

    def __init__(
        self,
        url: str,
        *,
        model: str,
        name: str,
        rubric: str | Path | Mapping[str, Any] | Rubric | None = None,
        token: Token | None = None,
        transport: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(
            url, model=model, rubric=rubric, token=token, transport=transport, **options
        )
        self.names = (name,)
        self._unread = 0

    @property
    def address(self) -> str:
        """URL of the server."""
        return self.judge_options.url

    @property
    def usage(self) -> Usage:
        """What all scores of this member took together."""
        taken = self._judge.usage
        return taken.with_read(taken.calls - self._unread)

    @property
    def token(self) -> Token | None:
        """The bearer token, or a function that returns the current one."""
        return self._judge.token

    @property
    def token_variable(self) -> str | None:
        """The environment variable in which the command line finds the token."""
        return self.judge_options.token_variable

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, 1) ratings; NaN where there is none, with a warning.

        The warning counts failures and names the first one's kind: it quotes no reply.

        Raises
        ------
        RemoteUnavailableError
            If the judge could not be reached for any sample.
        RemoteRefusalError
            If it refuses the address, the token or the model.
        """
        return self.begin(samples).result().scores

    def begin(self, samples: Sequence[Sample]) -> Pending[MemberScores]:
        """Send the questions without waiting; the result raises and warns as `score` does."""
        return self._begin(self._questions(samples), self._warned)

    def score_detailed(
        self,
        samples: Sequence[Sample],
        *,
        features: bool = False,  # noqa: ARG002 - a judge has none
        progress: Progress = silent,  # noqa: ARG002
    ) -> MemberScores:
        """Rate as `score` does; what failed is in `errors`, by row, and not in a warning."""
        return self._begin(self._questions(samples), self._detailed).result()

    def _questions(self, samples: Sequence[Sample]) -> list[Messages]:
        return [self.rubric.ask(s.prompt, completion=s.completion) for s in samples]

    def _detailed(self, answer: tuple[list[Reply], Usage]) -> MemberScores:
        """Read the replies; those that are no rating are errors."""
        replies, taken = answer
        ratings = [self._read(reply) for reply in replies]
        errors = {
            row: rating for row, rating in enumerate(ratings) if isinstance(rating, Exception)
        }
        self._unread += taken.calls - (len(ratings) - len(errors))
        scores = [rating.value if isinstance(rating, Rating) else np.nan for rating in ratings]
        return MemberScores(
            np.array(scores, dtype=np.float64).reshape(-1, 1),
            Truncation.none(len(scores)),
            errors=errors,
        )

    def _warned(self, answer: tuple[list[Reply], Usage]) -> MemberScores:
        detailed = self._detailed(answer)
        if detailed.errors:
            text = count_failures(
                detailed.errors.values(),
                len(detailed.scores),
                what="rating",
                where=f"{self.names[0]!r} at {self.judge_options.url}",
                unreadable="a reply that is no rating",
            )
            warnings.warn(text, RemoteFailureWarning, stacklevel=4)
        return detailed

    def with_token(self, token: Token | None) -> Self:
        """Return the same member with another token."""
        twin = copy.copy(self)
        twin._judge = Judge(self.judge_options, token=token, transport=self._judge.transport)
        twin._judge.usage = self._judge.usage
        return twin

    def _read(self, reply: Reply) -> Rating | RemoteError:
        if isinstance(reply, RemoteError):
            return reply
        return read_rating(reply, self.rubric.scale, self.rubric.after)

    # Storage -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return what is saved and reported, without the token."""
        return {
            "kind": self.kind,
            "name": self.names[0],
            "judge": self.judge_options.to_json(),
            "rubric": self.rubric.to_json(),
        }

    def _python(self) -> str | None:
        return None if self._judge.transport is None else "a transport"

    @classmethod
    def _of(cls, stored: Mapping[str, Any]) -> Self:
        options = JudgeOptions.from_json(stored["judge"])
        fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
        return cls(name=stored["name"], rubric=stored["rubric"], **fields)
