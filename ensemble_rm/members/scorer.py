"""The interface of a member: `Scorer`, one abstract method with defaults for all else."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import (
    NonFiniteScoreError,
    OptionError,
    RemoteNotAllowedError,
    StorageError,
)
from ensemble_rm.members.remote.address import Token, is_allowed, origin_of, token_for
from ensemble_rm.progress import Progress, silent

if TYPE_CHECKING:
    from ensemble_rm.members.backbone.options import TrunkOptions

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Truncation:
    """Which samples truncation cut in a call, and how many.

    Attributes
    ----------
    prompts, completions : ndarray of bool, shape (n_samples,)
        Whether each lost tokens at the beginning of the prompt, at the end of the completion.
    """

    prompts: NDArray[np.bool_]
    completions: NDArray[np.bool_]

    @classmethod
    def none(cls, n: int) -> Truncation:
        """Return that of `n` samples of which none was cut."""
        return cls(np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_))

    @classmethod
    def join(cls, parts: Sequence[Truncation]) -> Truncation:
        """Return that of the samples of all parts, in their order."""
        return cls(
            np.concatenate([part.prompts for part in parts]),
            np.concatenate([part.completions for part in parts]),
        )

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Truncation:
        """Return that of some of the samples."""
        return Truncation(self.prompts[rows], self.completions[rows])

    def __or__(self, other: Truncation) -> Truncation:
        """Return which of the same samples one or the other cut."""
        return Truncation(self.prompts | other.prompts, self.completions | other.completions)

    @property
    def samples(self) -> int:
        """Samples encoded."""
        return len(self.prompts)

    @property
    def prompts_cut(self) -> int:
        """Samples that lost tokens at the beginning of the prompt."""
        return int(self.prompts.sum())

    @property
    def completions_cut(self) -> int:
        """Samples that lost tokens at the end of the completion."""
        return int(self.completions.sum())

    def to_json(self) -> dict[str, int]:
        """Return the counts."""
        return {
            "samples": self.samples,
            "prompts_cut": self.prompts_cut,
            "completions_cut": self.completions_cut,
        }


@dataclass(frozen=True, eq=False)
class MemberScores:
    """Scores of one scorer, in the order of the samples.

    Attributes
    ----------
    scores : ndarray, shape (n_samples, n_members)
        Raw scores, each member in its own unit; NaN where a sample has no score.
    truncation : Truncation
        Which samples were cut.
    features : ndarray, shape (n_samples, n_features), optional
        Where they were asked for and the scorer has some.
    errors : mapping of int to Exception
        By row, why a sample has no score, as far as the scorer knows.
    """

    scores: Floats
    truncation: Truncation
    features: Floats | None = None
    errors: Mapping[int, Exception] = field(default_factory=dict)


class PendingScores(Protocol):
    """Scores that are on their way; see `Scorer.begin`."""

    def result(self) -> MemberScores:
        """Wait for the scores."""
        ...

    def cancel(self) -> None:
        """Give up what is not done yet."""
        ...


class Scorer(ABC):
    """A member, or several that share a model: samples in, one column of scores per member out.

    A subclass implements `score` and sets `names`. Every other method has a default that says
    "this scorer has no such thing". An object that is not a subclass, with `names` and `score`
    alone, works too: `RewardEnsemble` adapts it.

    Attributes
    ----------
    names : tuple of str
        One name per column.
    kind : str
        Under which a saved scorer is found again; empty for one that cannot be saved.
    options : TrunkOptions, optional
        How a model in this process reads and computes; None without one.
    has_model : bool
        Whether a model in this process is loaded at the first score and freed by `unload`.
    address : str, optional
        URL of the server that computes the scores; None where this process does.
    token : str or callable, optional
        Bearer token for that server, or a function that returns the current one. Never saved.
    """

    names: tuple[str, ...]
    kind: str = ""
    options: TrunkOptions | None = None
    has_model: bool = False

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> Floats:
        """Return (n_samples, n_members) float64 raw scores, in the order of the samples.

        NaN means that a sample has no score; the aggregator's policy decides what follows.
        """

    # What else comes of a pass ------------------------------------------------------------------

    def score_detailed(
        self,
        samples: Sequence[Sample],
        *,
        features: bool = False,
        progress: Progress = silent,  # noqa: ARG002 - the default has no steps to report
    ) -> MemberScores:
        """Return the scores with what was cut, why scores are missing and, if asked, features.

        Parameters
        ----------
        samples : sequence of Sample
        features : bool
            Whether to return the features, too; override to compute both in one pass.
        progress : callable
            Called with (stage, done, total).
        """
        return MemberScores(
            self.score(samples),
            Truncation.none(len(samples)),
            self.features(samples) if features else None,
        )

    def features(self, samples: Sequence[Sample]) -> Floats | None:  # noqa: ARG002 - has none
        """Return (n_samples, n_features) inputs of the members' heads; None where there are none.

        Distances to the training inputs are taken between features.
        """
        return None

    def begin(self, samples: Sequence[Sample]) -> PendingScores | None:  # noqa: ARG002 - the same
        """Start scoring elsewhere without waiting; None where this process computes the scores.

        An ensemble begins all its members before it computes any score of its own, so that it
        takes as long as its slowest member and not as long as all of them.
        """
        return None

    # Caches -------------------------------------------------------------------------------------

    @property
    def digest(self) -> str | None:
        """SHA-256 of all that the scores depend on; None, the default, means: never cache them."""
        return None

    # Models in memory ---------------------------------------------------------------------------

    def unload(self) -> None:  # noqa: B027 - a scorer without a model has nothing to free
        """Free the model's memory; the next score loads it again."""

    def unloaded(self) -> Scorer:
        """Return the same members with no model in memory yet."""
        return self

    def with_options(self, options: TrunkOptions) -> Scorer:
        """Return the same members under other options: another dtype, another device.

        Raises
        ------
        OptionError
            If there is no model in this process.
        """
        raise OptionError(f"{self._title()} has no model here, so that {options} do not apply")

    # Servers ------------------------------------------------------------------------------------

    @property
    def address(self) -> str | None:
        """URL of the server that computes the scores; None where this process does."""
        return None

    @property
    def token(self) -> Token | None:
        """Bearer token for the server, or a function that returns the current one."""
        return None

    def with_token(self, token: Token | None) -> Scorer:  # noqa: ARG002 - the default takes none
        """Return the same members with another token.

        Raises
        ------
        OptionError
            If they are not on a server.
        """
        raise OptionError(f"{self._title()} is not on a server and takes no token")

    # Storage ------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:  # noqa: ARG002 - the default cannot be saved
        """Write safetensors and JSON to a new folder.

        Raises
        ------
        StorageError
            If this kind of scorer cannot be saved.
        """
        raise StorageError(
            f"{self._title()} cannot be saved; save the others, and add it again after loading"
        )

    def describe(self) -> dict[str, Any]:
        """Return what provenance and reports record about the scorer, as JSON values.

        Raises
        ------
        StorageError
            If this kind of scorer cannot be saved.
        """
        raise StorageError(f"{self._title()} cannot be described in a file")

    def with_names(self, names: Sequence[str]) -> Self:
        """Return a copy with other column names.

        Raises
        ------
        OptionError
            If there is not one name per column.
        """
        if len(names) != len(self.names):
            raise OptionError(f"{len(names)} names for the {len(self.names)} members {self.names}")
        twin = copy.copy(self)
        twin.names = tuple(names)
        return twin

    def _title(self) -> str:
        return f"member {', '.join(map(repr, self.names))} ({type(self).__name__})"


class ScorerLike(Protocol):
    """What `RewardEnsemble` needs of a member: `names` and `score`.

    Every `Scorer` is one, and so is any other class with these two.

    Examples
    --------
    >>> class Brevity:
    ...     names = ("brevity",)
    ...
    ...     def score(self, samples: Sequence[Sample]) -> Floats:
    ...         return np.array([[-float(len(sample.completion))] for sample in samples])
    """

    @property
    def names(self) -> tuple[str, ...]:
        """One name per column."""
        ...

    def score(self, samples: Sequence[Sample], /) -> Floats:
        """Return (n_samples, n_members) raw scores, in the order of the samples."""
        ...


class FunctionScorer(Scorer):
    """A Python function as a member: a rule, a verifier, a length penalty.

    Parameters
    ----------
    name : str
        Name of the column.
    function : callable
        Takes a sample, returns its score: any finite real number.

    Examples
    --------
    >>> brevity = FunctionScorer("brevity", lambda sample: -len(sample.completion))
    >>> brevity.score([Sample("Why?", "Because.")])
    array([[-8.]])
    """

    def __init__(self, name: str, function: Callable[[Sample], float]) -> None:
        self.names = (name,)
        self._function = function

    def score(self, samples: Sequence[Sample]) -> Floats:
        """Return (n_samples, 1) scores."""
        scores = [float(self._function(sample)) for sample in samples]
        return np.array(scores, dtype=np.float64).reshape(-1, 1)


class AdaptedScorer(Scorer):
    """An object with `names` and `score` alone, as a `Scorer`.

    Parameters
    ----------
    member : ScorerLike
    """

    def __init__(self, member: ScorerLike) -> None:
        self.member = member
        self.names = tuple(member.names)

    def score(self, samples: Sequence[Sample]) -> Floats:
        """Return the object's scores."""
        return self.member.score(samples)

    def _title(self) -> str:
        return f"member {', '.join(map(repr, self.names))} ({type(self.member).__name__})"


def as_scorer(member: ScorerLike) -> Scorer:
    """Return a member as a `Scorer`; an object with `names` and `score` alone is adapted.

    Raises
    ------
    OptionError
        If the object has no `names`, or no method `score`.
    """
    if isinstance(member, Scorer):
        return member
    if not callable(getattr(member, "score", None)) or getattr(member, "names", None) is None:
        raise OptionError(
            f"a member needs `names` and `score(samples)`; {type(member).__name__} lacks one of "
            "them; subclass ensemble_rm.Scorer"
        )
    return AdaptedScorer(member)


# Checks of what a scorer returns -----------------------------------------------------------------


def check_scores(scorer: Scorer, scores: Floats, n: int) -> Floats:
    """Return the scores if they have the promised shape and none is infinite; NaN passes.

    Raises
    ------
    OptionError
        If the shape is not (n, number of names).
    NonFiniteScoreError
        If a score is infinite.
    """
    matrix = np.asarray(scores, dtype=np.float64)
    if matrix.shape != (n, len(scorer.names)):
        raise OptionError(
            f"{scorer._title()} returned scores of shape {matrix.shape} for {n} samples and "
            f"{len(scorer.names)} names; a scorer returns (n_samples, n_members)"
        )
    infinite = np.isinf(matrix).any(axis=0)
    if infinite.any():
        culprit = scorer.names[int(np.flatnonzero(infinite)[0])]
        raise NonFiniteScoreError(f"member {culprit!r} scored infinity")
    return matrix


def check_features(scorer: Scorer, features: Floats, n: int) -> Floats:
    """Return the features if they have the promised shape, (n, n_features).

    Raises
    ------
    OptionError
        If they have not.
    """
    matrix = np.asarray(features, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) != n:
        raise OptionError(
            f"{scorer._title()} returned features of shape {matrix.shape} for {n} samples; "
            "they are (n_samples, n_features)"
        )
    return matrix


def scorer_features(scorers: Sequence[Scorer], samples: Sequence[Sample]) -> Floats | None:
    """Return the features of all scorers that have some, in adjacent columns; None without any.

    Parameters
    ----------
    scorers : sequence of Scorer
        Of an ensemble.
    samples : sequence of Sample

    Returns
    -------
    ndarray, shape (n_samples, n_features), optional
        In the order of the samples.

    Raises
    ------
    OptionError
        If a scorer returns another number of rows.
    """
    columns = [
        check_features(scorer, features, len(samples))
        for scorer in scorers
        if (features := scorer.features(samples)) is not None
    ]
    return np.concatenate(columns, axis=1) if columns else None


# Tokens of members on servers --------------------------------------------------------------------


def with_tokens_of(scorers: Sequence[Scorer], others: Sequence[Scorer]) -> tuple[Scorer, ...]:
    """Return the same members; those on servers without a token take it from `others`.

    A member takes the token of the member of the same name at the same address. Without such a
    member, it takes the only token that is known for that address.

    Parameters
    ----------
    scorers, others : sequence of Scorer
    """

    def with_known_token(scorer: Scorer) -> Scorer:
        if scorer.address is None or scorer.token is not None:
            return scorer
        there = [other for other in others if other.address == scorer.address]
        same = [other.token for other in there if other.names == scorer.names]
        tokens = same or [other.token for other in there if other.token is not None]
        if not tokens or tokens[0] is None or any(token != tokens[0] for token in tokens):
            return scorer
        return scorer.with_token(tokens[0])

    return tuple(map(with_known_token, scorers))


def with_tokens(scorers: Sequence[Scorer], tokens: Mapping[str, Token]) -> tuple[Scorer, ...]:
    """Return the same members, those on servers that are named with these bearer tokens.

    Parameters
    ----------
    scorers : sequence of Scorer
    tokens : mapping of str to str or callable
        By server: ``[SCHEME://]HOST[:PORT]``. A token goes to that server alone; without a
        scheme, over https, or to this machine.

    Raises
    ------
    OptionError
        If a token would be sent without encryption and its scheme is not named.
    """

    def bound(scorer: Scorer) -> Scorer:
        token = None if scorer.address is None else token_for(scorer.address, tokens)
        return scorer if token is None else scorer.with_token(token)

    return tuple(map(bound, scorers))


def check_addresses(scorers: Sequence[Scorer], allow_remote: Sequence[str]) -> None:
    """Check that every member on another server is on one that the caller allows.

    Parameters
    ----------
    scorers : sequence of Scorer
    allow_remote : sequence of str
        Servers, each as ``[SCHEME://]HOST[:PORT]``.

    Raises
    ------
    RemoteNotAllowedError
        If a member is elsewhere.
    """
    for scorer in scorers:
        if scorer.address is not None and not is_allowed(scorer.address, allow_remote):
            raise RemoteNotAllowedError(
                f"{scorer._title()} is on the server {scorer.address}, to which prompts and "
                "completions would be sent; if you trust it, allow it with --allow-remote "
                f"{origin_of(scorer.address)} (allow_remote=[…] in Python)"
            )


def check_no_new_address(scorers: Sequence[Scorer], before: Sequence[Scorer]) -> None:
    """Check that a new version has no member on a server that the one before does not use.

    Raises
    ------
    RemoteNotAllowedError
        If it has.
    """
    known = {scorer.address for scorer in before}
    for scorer in scorers:
        if scorer.address not in known and scorer.address is not None:
            raise RemoteNotAllowedError(
                f"the new version adds {scorer._title()} on the server {scorer.address}; load it "
                "again, and allow that server, if you trust it"
            )
