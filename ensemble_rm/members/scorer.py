"""The protocol that every kind of member keeps: samples in, a matrix of scores out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import NonFiniteScoreError, OptionError
from ensemble_rm.members.backbone.trunk import TrunkOptions
from ensemble_rm.members.encoding import Truncation
from ensemble_rm.progress import Progress
from ensemble_rm.scoring.model_pool import ModelPool, Unloadable
from ensemble_rm.scoring.score_cache import ScoreCache


@runtime_checkable
class Scorer(Protocol):
    """Scores samples, one column a member.

    A user's own kind of member writes these two; everything else is built on them.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """One name a column."""
        ...

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, n_members) raw scores, in the order of the samples."""
        ...


@runtime_checkable
class TextScorer(Scorer, Protocol):
    """A scorer that tokenises: it reports progress and what truncation took."""

    def score_counted(
        self, samples: Sequence[Sample], *, progress: Progress
    ) -> tuple[NDArray[np.float64], Truncation]:
        """Return the scores, and how many samples were cut."""
        ...


@runtime_checkable
class DigestedScorer(TextScorer, Protocol):
    """A scorer whose raw scores can be kept: one digest says all that they depend on."""

    @property
    def digest(self) -> str:
        """Equal where the scores of equal samples are."""
        ...


@runtime_checkable
class OptionedScorer(Scorer, Protocol):
    """A scorer that can read and compute in another way: another dtype, another device."""

    options: TrunkOptions

    def with_options(self, options: TrunkOptions) -> Scorer:
        """Return the same member under other options; weights are loaded at its first score."""
        ...


@runtime_checkable
class ReloadableScorer(OptionedScorer, Unloadable, Protocol):
    """A scorer whose model can leave memory, and comes back at its next score."""


@runtime_checkable
class StoredScorer(Scorer, Protocol):
    """A scorer that can be saved to a folder and read back by its kind's name."""

    kind: str

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON to a new folder."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what provenance and reports say of it."""
        ...


@runtime_checkable
class TokenScorer(Scorer, Protocol):
    """A scorer on another server, which a token lets in; it is saved without."""

    @property
    def address(self) -> str:
        """The server's."""
        ...

    @property
    def token(self) -> str | Callable[[], str] | None:
        """The bearer token, or what returns the one that holds now."""
        ...

    @property
    def token_variable(self) -> str | None:
        """The environment variable in which the command line finds it."""
        ...

    def with_token(self, token: str | Callable[[], str] | None) -> Scorer:
        """Return the same member with another token."""
        ...


class PendingScores(Protocol):
    """Scores that were asked for and have not been read."""

    def result(self) -> NDArray[np.float64]:
        """Wait for the (n_samples, n_members) raw scores."""
        ...

    def cancel(self) -> None:
        """Give up what is not done."""
        ...


@runtime_checkable
class ElsewhereScorer(Scorer, Protocol):
    """A scorer that waits for others: all such members of an ensemble are asked at once."""

    def begin_score(self, samples: Sequence[Sample]) -> PendingScores:
        """Ask for what `score` returns, and do not wait."""
        ...


@runtime_checkable
class FeatureScorer(Scorer, Protocol):
    """A scorer that shows what it reads, so that distances to the training inputs can be taken."""

    def features(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, n_features) features, in the order of the samples."""
        ...


class FunctionScorer:
    """A Python function as a member: a rule, a verifier, a length penalty.

    Parameters
    ----------
    name : str
        The column's name.
    function : callable
        Takes a sample, returns its score: any finite real number.
    """

    def __init__(self, name: str, function: Callable[[Sample], float]) -> None:
        self.names = (name,)
        self._function = function

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, 1) scores."""
        return np.array([[float(self._function(s))] for s in samples], dtype=np.float64).reshape(
            len(samples), 1
        )


def checked_scores(scorer: Scorer, scores: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return the scores where they have the promised shape; infinity is an error, NaN is not yet.

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
            f"{type(scorer).__name__} returned scores of shape {matrix.shape} for {n} samples and "
            f"{len(scorer.names)} names; a scorer returns (n_samples, n_members)"
        )
    infinite = np.isinf(matrix).any(axis=0)
    if infinite.any():
        culprit = scorer.names[int(np.flatnonzero(infinite)[0])]
        raise NonFiniteScoreError(f"member {culprit!r} scored infinity")
    return matrix


def scorer_features(
    scorers: Sequence[Scorer], samples: Sequence[Sample]
) -> NDArray[np.float64] | None:
    """Return the features of all scorers that have some, side by side; None where none has.

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
    found = [
        checked_features(scorer, scorer.features(samples), len(samples))
        for scorer in scorers
        if isinstance(scorer, FeatureScorer)
    ]
    return np.concatenate(found, axis=1) if found else None


def checked_features(
    scorer: FeatureScorer, features: NDArray[np.float64], n: int
) -> NDArray[np.float64]:
    """Return the features where they have the promised shape, (n, n_features).

    Raises
    ------
    OptionError
        If they have not.
    """
    read = np.asarray(features, dtype=np.float64)
    if read.ndim != 2 or len(read) != n:
        raise OptionError(
            f"{type(scorer).__name__} returned features of shape {read.shape} for {n} samples; "
            "they are (n_samples, n_features)"
        )
    return read


def unloaded(scorers: Sequence[Scorer]) -> tuple[Scorer, ...]:
    """Return the same members, with no model in memory as yet; others stay as they are."""
    return tuple(
        scorer.with_options(scorer.options) if isinstance(scorer, ReloadableScorer) else scorer
        for scorer in scorers
    )


def with_tokens_of(scorers: Sequence[Scorer], others: Sequence[Scorer]) -> tuple[Scorer, ...]:
    """Return the same members, those on servers that others have tokens for with these.

    A member has the token of its namesake at its address; one without a namesake there has the
    only one that is known there.
    """
    known = [one for one in others if isinstance(one, TokenScorer)]

    def let_in(one: Scorer) -> Scorer:
        if not isinstance(one, TokenScorer) or one.token is not None:
            return one
        there = [other for other in known if other.address == one.address]
        same = [other.token for other in there if other.names == one.names]
        tokens = same or [other.token for other in there if other.token is not None]
        if not tokens or tokens[0] is None or any(token != tokens[0] for token in tokens):
            return one
        return one.with_token(tokens[0])

    return tuple(map(let_in, scorers))


def with_tokens(
    scorers: Sequence[Scorer], tokens: Mapping[str, str | Callable[[], str]]
) -> tuple[Scorer, ...]:
    """Return the same members, those that are named here with these tokens.

    Raises
    ------
    OptionError
        If a name is none of a member on another server.
    """
    there = {name for one in scorers if isinstance(one, TokenScorer) for name in one.names}
    if unknown := sorted(set(tokens) - there):
        raise OptionError(
            f"tokens name {', '.join(map(repr, unknown))}; members on other servers are "
            f"{', '.join(map(repr, sorted(there))) or 'none'}"
        )
    return tuple(
        one.with_token(tokens[one.names[0]])
        if isinstance(one, TokenScorer) and one.names[0] in tokens
        else one
        for one in scorers
    )


def score_all(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    *,
    cache: ScoreCache | None = None,
    pool: ModelPool | None = None,
    progress: Progress,
) -> tuple[NDArray[np.float64], Truncation]:
    """Return every member's raw scores, (n_samples, n_members), and which samples were cut.

    Members on other servers are asked first, and waited for last.

    Parameters
    ----------
    scorers : sequence of Scorer
    samples : sequence of Sample
    cache : ScoreCache, optional
        Looked into, and filled, for every scorer that has a digest.
    pool : ModelPool, optional
        How many scorers hold their models at once; all where there is none.
    progress : callable
        Called with (stage, done, total).
    """
    columns: dict[int, NDArray[np.float64]] = {}
    cut = Truncation.none(len(samples))
    with asked_ahead(scorers, samples) as asked:
        for scorer in scorers if pool is None else pool.loaded_first(scorers):
            if id(scorer) in asked:
                continue
            compute = partial(_score, scorer, pool=pool, progress=progress)
            if cache is not None and len(samples) > 0 and isinstance(scorer, DigestedScorer):
                scores, more = cache.scores(scorer.digest, samples, compute)
            else:
                scores, more = compute(samples)
            columns[id(scorer)] = scores
            cut |= more
        columns |= {key: waited() for key, waited in asked.items()}
    return np.concatenate([columns[id(scorer)] for scorer in scorers], axis=1), cut


@contextmanager
def asked_ahead(
    scorers: Sequence[Scorer], samples: Sequence[Sample]
) -> Iterator[dict[int, Callable[[], NDArray[np.float64]]]]:
    """Ask all members on other servers; what is not done in the end is given up.

    Parameters
    ----------
    scorers : sequence of Scorer
    samples : sequence of Sample

    Yields
    ------
    dict of int to callable
        By a scorer's id, in their order, what waits for its scores.
    """
    asked: list[PendingScores] = []
    found: dict[int, Callable[[], NDArray[np.float64]]] = {}
    try:
        for scorer in scorers:
            if isinstance(scorer, ElsewhereScorer):
                asked.append(scorer.begin_score(samples))
                found[id(scorer)] = partial(_waited, scorer, asked[-1], len(samples))
        yield found
    finally:
        for one in asked:
            one.cancel()


def _waited(scorer: Scorer, pending: PendingScores, n: int) -> NDArray[np.float64]:
    return checked_scores(scorer, pending.result(), n)


def _score(
    scorer: Scorer, samples: Sequence[Sample], *, pool: ModelPool | None, progress: Progress
) -> tuple[NDArray[np.float64], Truncation]:
    cut = Truncation.none(len(samples))
    with nullcontext() if pool is None else pool.using(scorer):
        if isinstance(scorer, TextScorer):
            scores, cut = scorer.score_counted(samples, progress=progress)
        else:
            scores = scorer.score(samples)
    return checked_scores(scorer, scores, len(samples)), cut
