"""A judge model that rates one answer, as a member: its rating is the score."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.errors import OptionError, RemoteFailureWarning, StorageError
from ensemble_rm.members.judging.asking import Judge, JudgeOptions, Reply
from ensemble_rm.members.judging.reading import Rating, read_rating
from ensemble_rm.members.judging.rubric import Rubric, read_rubric
from ensemble_rm.members.judging.usage import Usage
from ensemble_rm.members.remote.address import Token
from ensemble_rm.samples import Sample


class JudgeScorer:
    """Rates completions by asking a judge model; the rating is the raw score.

    The rating is the expectation over the ratings' tokens (Liu et al. 2023, arXiv 2303.16634)
    where the server offers log-probabilities, and the number that was said where it does not: that
    makes ties. A reply that is no rating is NaN, by the aggregator's policy for missing members.

    Parameters
    ----------
    url : str
        Of an OpenAI-compatible server, such as ``http://localhost:8000/v1``; saved.
    model : str
        The judge's name there.
    name : str
        The column's.
    rubric : str, Path, mapping or Rubric
        What is asked: ``"pointwise"``, a JSON file or its content; saved as it is.
    token : str or callable, optional
        A bearer token, or what returns the one that holds now. Never saved.
    transport : httpx.AsyncBaseTransport, optional
        In the place of the network.
    **options : Any
        The other fields of `JudgeOptions`.

    Attributes
    ----------
    usage : Usage
        What all scores of this member took together.

    Raises
    ------
    OptionError
        If an option or the rubric cannot be used.
    MissingExtraError
        If httpx is not installed.
    """

    kind = "judge"

    def __init__(
        self,
        url: str,
        *,
        model: str,
        name: str,
        rubric: str | Path | Mapping[str, Any] | Rubric = "pointwise",
        token: Token | None = None,
        transport: Any = None,
        **options: Any,
    ) -> None:
        self.rubric = read_rubric(rubric)
        if self.rubric.kind != "pointwise":
            raise OptionError(f"a scorer needs a pointwise rubric; {self.rubric.name} compares")
        self.names = (name,)
        self.options = JudgeOptions(url=url, model=model, **options)
        self.usage = Usage()
        self._judge = Judge(self.options, token=token, transport=transport)

    @property
    def address(self) -> str:
        """The server's."""
        return self.options.url

    @property
    def token(self) -> Token | None:
        """The bearer token, or what returns the one that holds now."""
        return self._judge.token

    @property
    def token_variable(self) -> str | None:
        """The environment variable in which the command line finds the token."""
        return self.options.token_variable

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, 1) ratings; NaN where there is none, with a warning.

        Raises
        ------
        RemoteUnavailableError
            If the judge could not be reached for any sample.
        RemoteRefusalError
            If it refuses the address, the token or the model.
        """
        questions = [self.rubric.ask(s.prompt, completion=s.completion) for s in samples]
        replies, usage = self._judge.ask(questions, max_tokens=self.rubric.max_tokens)
        read = [self._read(reply) for reply in replies]
        failed = [one for one in read if isinstance(one, str)]
        self.usage += usage.with_read(len(read) - len(failed))
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(samples)} samples have no rating of {self.names[0]!r} at "
                f"{self.options.url}; the first: {failed[0]}",
                RemoteFailureWarning,
                stacklevel=2,
            )
        scores = [one.value if isinstance(one, Rating) else np.nan for one in read]
        return np.array(scores, dtype=np.float64).reshape(len(samples), 1)

    def close(self) -> None:
        """Close the connections; the next score opens new ones."""
        self._judge.close()

    def with_token(self, token: Token | None) -> Self:
        """Return the same member with another token."""
        twin = copy.copy(self)
        twin._judge = Judge(self.options, token=token, transport=self._judge.transport)
        return twin

    def _read(self, reply: Reply) -> Rating | str:
        if isinstance(reply, str):
            return reply
        return read_rating(reply, self.rubric.scale, self.rubric.after)

    # Storage -----------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return what provenance and reports say of it: no token."""
        return {
            "kind": self.kind,
            "name": self.names[0],
            "judge": self.options.to_json(),
            "rubric": self.rubric.to_json(),
        }

    def save(self, folder: Path) -> None:
        """Write ``member.json``: the address, the options and the rubric, never the token.

        Raises
        ------
        StorageError
            If a transport was given.
        """
        if self._judge.transport is not None:
            raise StorageError(
                f"member {self.names[0]!r} has a transport, which cannot be saved; add the member "
                "again after loading"
            )
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.describe(), indent=1, ensure_ascii=False)
        (folder / "member.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        backbone: str | Path | None = None,  # noqa: ARG003 - members over a model have one
        device: str | None = None,  # noqa: ARG003
        cache_dir: Path | None = None,  # noqa: ARG003
    ) -> Self:
        """Read what `save` wrote; it has no token, see `with_token`.

        Raises
        ------
        StorageError
            If the folder is incomplete.
        """
        try:
            said = json.loads((folder / "member.json").read_text(encoding="utf-8"))
            options = JudgeOptions.from_json(said["judge"])
            fields = {name: getattr(options, name) for name in options.__dataclass_fields__}
            return cls(name=said["name"], rubric=said["rubric"], **fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{folder} holds no saved judge: {error!r}") from error
