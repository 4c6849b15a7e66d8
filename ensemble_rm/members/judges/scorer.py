"""A judge model as a member: its rating of a completion is the score."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import RemoteError
from ensemble_rm.members.judges.asking import Judge, JudgeOptions, Messages, Reply
from ensemble_rm.members.judges.base import RubricJudge
from ensemble_rm.members.judges.replies import Rating, read_rating
from ensemble_rm.members.judges.rubric import Rubric, read_rubric
from ensemble_rm.members.judges.usage import Price, Usage
from ensemble_rm.members.remote.address import Token
from ensemble_rm.members.remote.client import ClientOptions
from ensemble_rm.members.remote.loop_thread import Pending
from ensemble_rm.members.remote.server_scorer import ServerScorer
from ensemble_rm.members.scorer import MemberScores, Truncation
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import as_object, at, get


class JudgeScorer(RubricJudge, ServerScorer):
    """Rates completions by asking a judge model; the rating is the raw score.

    If the server returns log-probabilities, the rating is the expectation over the ratings' tokens
    (Liu et al. 2023, arXiv 2303.16634). Otherwise it is the number in the reply, which produces
    ties. A reply without a rating is NaN, and the aggregator's policy for missing members applies.

    Parameters
    ----------
    url : str
        Address of an OpenAI-compatible server, such as ``http://localhost:8000/v1``; saved.
    model : str
        Name of the judge on that server.
    name : str
        Name of the column.
    rubric : str, Path, mapping or Rubric, optional
        The question: ``"pointwise"`` (default), a JSON file or its content; its content is saved.
    logprobs : bool
        Whether to request log-probabilities; if the server refuses them, requests omit them.
    extra : mapping of str to JSON values, optional
        Fields that are added to the request or replace its own; None removes a field.
    price : Price, optional
        Price of the judge's tokens.
    client : ClientOptions, optional
        Attempts, pauses, deadline, concurrency, circuit breaker.
    token : str or callable, optional
        Bearer token, or a function that returns the current one. Never saved.
    transport : httpx.AsyncBaseTransport, optional
        Replaces the network, in tests and for proxies.

    Attributes
    ----------
    usage : Usage
        Usage of all scores of this member, cancelled ones included.

    Raises
    ------
    OptionError
        If an option or the rubric is invalid.
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
        logprobs: bool = True,
        extra: Mapping[str, Any] | None = None,
        price: Price | None = None,
        client: ClientOptions | None = None,
        token: Token | None = None,
        transport: Any = None,
    ) -> None:
        super().__init__(
            url,
            model=model,
            rubric=rubric,
            logprobs=logprobs,
            extra=extra,
            price=price,
            client=client,
            token=token,
            transport=transport,
        )
        self.names = (name,)
        self._unread = 0  # replies without a rating, over all scores

    @property
    def address(self) -> str:
        """URL of the server."""
        return self.judge_options.url

    @property
    def usage(self) -> Usage:
        """Usage of all scores of this member."""
        usage = self._judge.usage
        return usage.with_read(usage.calls - self._unread)

    @property
    def token(self) -> Token | None:
        """The bearer token, or a function that returns the current one."""
        return self._judge.token

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, 1) ratings; NaN where there is none, with a warning.

        The warning states the number of failures and the kind of the first; `score_detailed`
        returns the errors.

        Raises
        ------
        RemoteUnavailableError
            If the judge could not be reached for any sample.
        RemoteRefusalError
            If the server refuses the address, the token or the model.
        """
        return self.begin(samples).result().scores

    def begin(self, samples: Sequence[Sample]) -> Pending[MemberScores]:
        """Send the questions without waiting; the result raises and warns as `score` does."""
        return self._begin(self._questions(samples), self._warned)

    def score_detailed(
        self,
        samples: Sequence[Sample],
        *,
        features: bool = False,  # noqa: ARG002 - judges return no features
        progress: Progress = silent,  # noqa: ARG002
    ) -> MemberScores:
        """Rate as `score` does; failures are in `errors`, by row, without a warning."""
        return self._begin(self._questions(samples), self._detailed).result()

    def _questions(self, samples: Sequence[Sample]) -> list[Messages]:
        return [self.rubric.ask(s.prompt, completion=s.completion) for s in samples]

    def _detailed(self, result: tuple[list[Reply], Usage]) -> MemberScores:
        """Read the replies; a reply without a rating is an error."""
        replies, usage = result
        ratings = [self._read(reply) for reply in replies]
        errors = {
            row: rating for row, rating in enumerate(ratings) if isinstance(rating, Exception)
        }
        self._unread += usage.calls - (len(ratings) - len(errors))
        scores = [rating.value if isinstance(rating, Rating) else np.nan for rating in ratings]
        return MemberScores(
            np.array(scores, dtype=np.float64).reshape(-1, 1),
            Truncation.none(len(scores)),
            errors=errors,
        )

    def _warned(self, result: tuple[list[Reply], Usage]) -> MemberScores:
        scores = self._detailed(result)
        self._warn_of_failures(scores, what="rating", unreadable="a reply without a rating")
        return scores

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
        with at("judge"):
            options = JudgeOptions.from_json(as_object(stored.get("judge")))
        fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
        name = get(stored, "name", str)
        # An object, never a path: a saved member must not read other files.
        with at("rubric"):
            rubric = read_rubric(as_object(stored.get("rubric")))
        return cls(name=name, rubric=rubric, **fields)
