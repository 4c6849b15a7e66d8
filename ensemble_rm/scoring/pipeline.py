"""One pass over all members of an ensemble: scores, and what truncation cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.members.encoding import Truncation
from ensemble_rm.members.scorer import PendingScores, Scorer, check_scores
from ensemble_rm.progress import Progress
from ensemble_rm.scoring.model_pool import ModelPool
from ensemble_rm.scoring.score_cache import ScoreCache


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
            if cache is not None and len(samples) > 0 and (digest := scorer.digest) is not None:
                scores, more = cache.scores(digest, samples, compute)
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
            if (pending := scorer.begin(samples)) is not None:
                asked.append(pending)
                found[id(scorer)] = partial(_waited, scorer, pending, len(samples))
        yield found
    finally:
        for one in asked:
            one.cancel()


def _waited(scorer: Scorer, pending: PendingScores, n: int) -> NDArray[np.float64]:
    return check_scores(scorer, pending.result().scores, n)


def _score(
    scorer: Scorer, samples: Sequence[Sample], *, pool: ModelPool | None, progress: Progress
) -> tuple[NDArray[np.float64], Truncation]:
    with nullcontext() if pool is None else pool.using(scorer):
        found = scorer.score_detailed(samples, progress=progress)
    return check_scores(scorer, found.scores, len(samples)), found.truncation
