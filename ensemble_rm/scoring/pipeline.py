"""The one place where members are asked: scores, what was cut, distances, and every failure.

Each member is asked about each sample once. A sample that a member cannot score is found by halving
the batch of that member alone, so that it costs no other sample its score.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import (
    OptionError,
    RemoteActivationError,
    RemoteRefusalError,
    RemoteUnavailableError,
)
from ensemble_rm.members.scorer import (
    MemberScores,
    PendingScores,
    Scorer,
    Truncation,
    check_features,
    check_scores,
)
from ensemble_rm.progress import Progress, silent
from ensemble_rm.scoring.baselines import missing_references, reference_samples
from ensemble_rm.scoring.model_pool import ModelPool
from ensemble_rm.scoring.score_cache import ScoreCache
from ensemble_rm.uncertainty.distance import FeatureSpace

T = TypeVar("T")
Floats = NDArray[np.float64]
OnError: TypeAlias = Literal["raise", "record"]
Errors: TypeAlias = Mapping[tuple[int, str | None], Exception]
"""By (row, member), why a score is missing; the member is None where it is not one alone."""

_CHUNK = 4096  # samples whose features are in memory at once
# A server that is out of reach, refuses, or serves the wrong scores fails every sample alike: half
# of them would only wait for its whole deadline again.
_OUTAGES = (RemoteUnavailableError, RemoteRefusalError, RemoteActivationError)


@dataclass(frozen=True, eq=False)
class RawScores:
    """What all members returned for samples, in the order of the samples.

    Attributes
    ----------
    raw : ndarray, shape (n_samples, n_members)
        Scores, each member in its own unit; NaN where one is missing.
    truncation : Truncation
        Which samples any member cut; a sample's reference counts as part of it.
    failed : ndarray of bool, shape (n_samples,)
        Which samples a member raised an exception on; their rows are NaN.
    errors : mapping of (int, str or None) to Exception
        By row and member: why a sample failed, or why one member has no score of it.
    baseline : ndarray, shape (n_samples, n_members), optional
        Scores of each sample's reference completion, where they were asked for.
    distance : ndarray, shape (n_samples,), optional
        To the training inputs, where a feature space was given; NaN where a sample failed.
    features : ndarray, shape (n_samples, n_features), optional
        Of all members that have some, where they were asked for; NaN where a sample failed.
    """

    raw: Floats
    truncation: Truncation
    failed: NDArray[np.bool_]
    errors: Errors
    baseline: Floats | None = None
    distance: Floats | None = None
    features: Floats | None = None

    def take(self, rows: Sequence[int]) -> RawScores:
        """Return these rows, in this order; a row may come several times."""
        own: dict[int, list[tuple[str | None, Exception]]] = {}
        for (row, member), error in self.errors.items():
            own.setdefault(row, []).append((member, error))
        index = np.asarray(rows, dtype=np.int64)
        return RawScores(
            self.raw[index],
            self.truncation[index],
            self.failed[index],
            {(i, member): e for i, row in enumerate(rows) for member, e in own.get(row, ())},
            None if self.baseline is None else self.baseline[index],
            None if self.distance is None else self.distance[index],
            None if self.features is None else self.features[index],
        )


def score_members(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    *,
    baseline: bool = False,
    space: FeatureSpace | None = None,
    cache: ScoreCache | None = None,
    pool: ModelPool | None = None,
    on_error: OnError = "raise",
    progress: Progress = silent,
) -> RawScores:
    """Ask every member about every sample, once.

    Members on other servers are asked first and waited for last, so that their time and that of
    the members in this process overlap.

    Parameters
    ----------
    scorers : sequence of Scorer
    samples : sequence of Sample
    baseline : bool
        Whether to score each sample's reference completion, too; each distinct one once.
    space : FeatureSpace, optional
        Take the samples' distances in it, from the same pass where that is possible.
    cache : ScoreCache, optional
        Read, and filled, for every scorer that has a digest.
    pool : ModelPool, optional
        Limits how many models are in memory at once.
    on_error : {"raise", "record"}
        Whether the first exception of a member passes through, or fails its sample alone: the
        sample's row is then NaN, and the exception is in `errors`. One failing sample costs its
        member at most 2·log₂(n_samples) more passes.
    progress : callable
        Called with (stage, done, total).

    Raises
    ------
    BaselineError
        If a sample has no reference completion and needs one; the message names its row.
    OptionError
        If a scorer returns an array of another shape than (n_samples, n_members).
    NonFiniteScoreError
        If a score is infinite.
    """
    if on_error not in ("raise", "record"):
        raise OptionError(f"on_error must be 'raise' or 'record', not {on_error!r}")
    record = on_error == "record"
    if record and len(distinct := list(dict.fromkeys(samples))) < len(samples):
        row = {sample: i for i, sample in enumerate(distinct)}
        rows = [row[sample] for sample in samples]
        samples = distinct
    else:
        rows = None
    ask = partial(_ask, scorers, cache=cache, pool=pool, record=record)
    if space is not None and cache is None and not baseline:
        result = _with_distances(ask, samples, space, progress)
    else:
        with_references = partial(_with_references, ask, record=record)
        result = (with_references if baseline else ask)(samples, progress=progress)
        if space is not None:
            far, left = np.full(len(samples), np.nan), np.flatnonzero(~result.failed)
            known = [samples[int(i)] for i in left]
            far[left] = feature_distance(scorers, known, space, pool=pool, progress=progress)
            result = replace(result, distance=far)
    return result if rows is None else result.take(rows)


def _ask(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    *,
    cache: ScoreCache | None,
    pool: ModelPool | None,
    record: bool,
    features: bool = False,
    progress: Progress,
) -> RawScores:
    """Ask every member for scores and, if wanted, features."""
    n = len(samples)
    if record and not n:  # nothing that fails could be recorded
        width, none = sum(len(scorer.names) for scorer in scorers), np.zeros(0, dtype=np.bool_)
        return RawScores(np.empty((0, width)), Truncation.none(0), none, {})
    started: list[list[tuple[range, PendingScores]]] = [[] for _ in scorers]
    failed: list[dict[int, Exception]] = [{} for _ in scorers]
    answers: dict[int, MemberScores] = {}
    try:
        for i, scorer in enumerate(scorers):
            started[i] = _begin(scorer, samples, failed[i], record=record)
        # Computed here while the servers work.
        here = [i for i in range(len(scorers)) if not started[i] and not failed[i]]
        if pool is not None:  # those in memory first: that loads the fewest models
            here.sort(key=lambda i: not pool.holds(scorers[i]))
        for i in here:
            score = _scoring(scorers[i], cache, pool, features=features, progress=progress)
            try:
                answers[i] = _checked(scorers[i], score(samples), n)
            except BaseException as error:
                if not record:
                    raise
                parts = _halve(
                    partial(_score_checked, scorers[i], score), samples, error, failed[i]
                )
                answers[i] = _joined(scorers[i], parts, n)
        for i, scorer in enumerate(scorers):
            if i not in answers:
                waited = _wait(scorer, started[i], failed, failed[i], record=record)
                answers[i] = _joined(scorer, waited, n)
    finally:  # a member that failed leaves the requests of others unread
        for own in started:
            for _, pending in own:
                pending.cancel()
    return _combine(scorers, [answers[i] for i in range(len(scorers))], failed, n)


def feature_distance(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    space: FeatureSpace,
    *,
    pool: ModelPool | None = None,
    progress: Progress = silent,
) -> Floats:
    """Return samples' distances in a feature space, shape (n_samples,).

    No score is computed, and members without features are not asked.
    """
    far = []
    for begin in range(0, max(len(samples), 1), _CHUNK):
        chunk = samples[begin : begin + _CHUNK]
        columns = []
        for scorer in scorers:
            with nullcontext() if pool is None else pool.using(scorer):
                features = scorer.features(chunk)
            if features is not None:
                columns.append(check_features(scorer, features, len(chunk)))
        far.append(space.distance(np.concatenate(columns, axis=1)))
        progress("reading", begin + len(chunk), len(samples))
    return np.concatenate(far)


# One member --------------------------------------------------------------------------------------


def _begin(
    scorer: Scorer,
    samples: Sequence[Sample],
    failed: MutableMapping[int, Exception],
    *,
    record: bool,
) -> list[tuple[range, PendingScores]]:
    """Send a member's requests; none where this process computes its scores."""
    parts: Iterable[tuple[range, PendingScores | None]]
    try:
        parts = [(range(len(samples)), scorer.begin(samples))]
    except BaseException as error:  # a template, perhaps, that one sample does not fit
        if not record:
            raise
        parts = _halve(scorer.begin, samples, error, failed)
    return [(rows, pending) for rows, pending in parts if pending is not None]


def _wait(
    scorer: Scorer,
    started: Sequence[tuple[range, PendingScores]],
    everywhere: Sequence[Mapping[int, Exception]],
    failed: MutableMapping[int, Exception],
    *,
    record: bool,
) -> list[tuple[range, MemberScores]]:
    """Read what a server computed; it is asked about no sample twice."""
    parts = []
    for rows, pending in started:
        if len(rows) and all(any(row in own for own in everywhere) for row in rows):
            continue  # the samples failed elsewhere: nothing needs these scores
        try:
            parts.append((rows, _checked(scorer, pending.result(), len(rows))))
        except BaseException as error:
            if not record:
                raise
            failed.update(dict.fromkeys(rows, _as_exception(error)))
    return parts


def _scoring(
    scorer: Scorer,
    cache: ScoreCache | None,
    pool: ModelPool | None,
    *,
    features: bool,
    progress: Progress,
) -> Callable[[Sequence[Sample]], MemberScores]:
    """Return what scores with a member of this process, through pool and cache."""
    score = partial(scorer.score_detailed, features=features, progress=progress)
    compute = score if pool is None else partial(_score_in, pool, scorer, score)
    digest = None if cache is None else scorer.digest
    if cache is None or digest is None:
        return compute
    # Checked here, too: nothing of the wrong shape goes into the cache.
    return partial(cache.scores, digest, compute=partial(_score_checked, scorer, compute))


def _halve(
    work: Callable[[Sequence[Sample]], T],
    samples: Sequence[Sample],
    error: BaseException,
    failed: MutableMapping[int, Exception],
) -> Iterator[tuple[range, T]]:
    """Halve samples that failed together until those that fail are alone.

    Parameters
    ----------
    work : callable
        Raised `error` on all of `samples`.
    failed : mapping of int to Exception
        Takes the exceptions of the samples that fail alone.

    Yields
    ------
    tuple of (range, T)
        The rows of samples that succeed together, and what `work` returns.
    """
    rows, raised, waiting = range(len(samples)), error, list[range]()
    while True:
        failure = _as_exception(raised)
        if isinstance(failure, _OUTAGES):
            failed.update({row: failure for part in (rows, *waiting) for row in part})
            return
        if len(rows) <= 1:
            failed.update(dict.fromkeys(rows, failure))
        else:
            middle = (rows.start + rows.stop) // 2
            waiting += [range(middle, rows.stop), range(rows.start, middle)]
        while waiting:
            rows = waiting.pop()
            try:
                result = work(samples[rows.start : rows.stop])
            except BaseException as again:  # noqa: BLE001 - what ends the process is raised below
                raised = again
                break
            yield rows, result
        else:
            return


def _as_exception(error: BaseException) -> Exception:
    """Return why a sample failed; raise again what ends the process.

    A panic in Rust, such as a tokenizer's, is no `Exception`, and fails its sample all the same.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | asyncio.CancelledError):
        raise error
    failure = RuntimeError(f"scoring raised {type(error).__name__}")
    failure.__cause__ = error
    return failure


def _checked(scorer: Scorer, answer: MemberScores, n: int) -> MemberScores:
    """Return what a scorer returned, if it has the promised shapes."""
    scores = check_scores(scorer, answer.scores, n)
    if answer.features is None:
        return replace(answer, scores=scores)
    return replace(answer, scores=scores, features=check_features(scorer, answer.features, n))


def _score_in(
    pool: ModelPool,
    scorer: Scorer,
    score: Callable[[Sequence[Sample]], MemberScores],
    samples: Sequence[Sample],
) -> MemberScores:
    with pool.using(scorer):
        return score(samples)


def _score_checked(
    scorer: Scorer, score: Callable[[Sequence[Sample]], MemberScores], samples: Sequence[Sample]
) -> MemberScores:
    return _checked(scorer, score(samples), len(samples))


def _joined(scorer: Scorer, parts: Iterable[tuple[range, MemberScores]], n: int) -> MemberScores:
    """Put a scorer's answers about parts of n samples together; rows without an answer are NaN."""
    scores = np.full((n, len(scorer.names)), np.nan)
    cut = Truncation.none(n)
    errors: dict[int, Exception] = {}
    features: Floats | None = None
    for rows, answer in parts:
        at = slice(rows.start, rows.stop)
        scores[at] = answer.scores
        cut.prompts[at] = answer.truncation.prompts
        cut.completions[at] = answer.truncation.completions
        errors.update({rows.start + row: error for row, error in answer.errors.items()})
        if answer.features is not None:
            if features is None:
                features = np.full((n, answer.features.shape[1]), np.nan)
            features[at] = answer.features
    return MemberScores(scores, cut, features, errors)


def _combine(
    scorers: Sequence[Scorer],
    answers: Sequence[MemberScores],
    failed: Sequence[Mapping[int, Exception]],
    n: int,
) -> RawScores:
    """Put the members' columns in one matrix, and their errors in one mapping."""
    errors: dict[tuple[int, str | None], Exception] = {}
    cut = Truncation.none(n)
    for scorer, answer, own in zip(scorers, answers, failed, strict=True):
        member = scorer.names[0] if len(scorer.names) == 1 else None
        for row, error in (*answer.errors.items(), *own.items()):
            errors.setdefault((row, member), error)
        cut |= answer.truncation
    raw = np.concatenate([answer.scores for answer in answers], axis=1)
    lost = np.zeros(n, dtype=np.bool_)
    lost[[row for own in failed for row in own]] = True
    # Without the member that raised, the others would make another reward than was asked for.
    raw[lost] = np.nan
    features = [answer.features for answer in answers if answer.features is not None]
    read = np.concatenate(features, axis=1) if features else None
    return RawScores(raw, cut, lost, errors, features=read)


# Prompt baselines and distances ------------------------------------------------------------------


def _with_references(
    ask: Callable[..., RawScores], samples: Sequence[Sample], *, progress: Progress, record: bool
) -> RawScores:
    """Score samples and, each once, their references; a sample fails where its reference does."""
    errors: dict[tuple[int, str | None], Exception] = {}
    if record:
        errors.update({(row, None): error for row, error in missing_references(samples).items()})
    rows = [row for row in range(len(samples)) if (row, None) not in errors]
    references, places = reference_samples([samples[row] for row in rows])
    both = ask([*(samples[row] for row in rows), *references], progress=progress)
    n, m = len(samples), len(rows)
    raw, below = np.full((2, n, both.raw.shape[1]), np.nan)
    raw[rows], below[rows] = both.raw[:m], both.raw[m:][places]
    cut = Truncation.none(n)
    cut.prompts[rows] = both.truncation.prompts[:m] | both.truncation.prompts[m:][places]
    cut.completions[rows] = (
        both.truncation.completions[:m] | both.truncation.completions[m:][places]
    )
    lost = np.ones(n, dtype=np.bool_)
    lost[rows] = both.failed[:m] | both.failed[m:][places]
    raw[lost] = np.nan
    for (row, member), error in both.errors.items():
        for own in [row] if row < m else np.flatnonzero(places == row - m):
            errors.setdefault((rows[own], member), error)
    return RawScores(raw, cut, lost, errors, below)


def _with_distances(
    ask: Callable[..., RawScores],
    samples: Sequence[Sample],
    space: FeatureSpace,
    progress: Progress,
) -> RawScores:
    """Score and take distances in one pass, some thousand samples at a time."""
    parts: list[RawScores] = []
    far: list[Floats] = []
    errors: dict[tuple[int, str | None], Exception] = {}
    for begin in range(0, max(len(samples), 1), _CHUNK):
        chunk = samples[begin : begin + _CHUNK]

        def report(
            stage: str, done: int, total: int, begin: int = begin, m: int = len(chunk)
        ) -> None:
            progress(stage, begin + int(m * (done / total if total else 1.0)), len(samples))

        part = ask(chunk, features=True, progress=report)
        distance = np.full(len(chunk), np.nan)
        if part.features is not None:
            known = ~np.isnan(part.features).any(axis=1)  # a sample that failed has none
            distance[known] = space.distance(part.features[known])
        parts.append(replace(part, features=None))
        far.append(distance)
        errors.update({(begin + row, member): e for (row, member), e in part.errors.items()})
    return RawScores(
        np.concatenate([part.raw for part in parts]),
        Truncation.join([part.truncation for part in parts]),
        np.concatenate([part.failed for part in parts]),
        errors,
        distance=np.concatenate(far),
    )
