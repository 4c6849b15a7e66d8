"""Scores and features of the same samples, in one pass of the models that have both.

For distances to the training inputs; knows nothing of where those lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.members.encoding import Truncation
from ensemble_rm.members.scorer import Scorer, check_features, check_scores
from ensemble_rm.progress import Progress
from ensemble_rm.scoring.model_pool import ModelPool
from ensemble_rm.scoring.pipeline import asked_ahead

CHUNK = 4096  # samples whose features are in memory at once


def score_and_features(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    *,
    pool: ModelPool | None = None,
    progress: Progress,
) -> Iterator[tuple[NDArray[np.float64], Truncation, NDArray[np.float64]]]:
    """Yield raw scores, what was cut, and the features of all scorers that have some, in chunks.

    Parameters
    ----------
    scorers : sequence of Scorer
        At least one of them has features.
    samples : sequence of Sample
    pool : ModelPool, optional
        How many scorers hold their models at once.
    progress : callable
        Called with (stage, done, total), in samples.

    Yields
    ------
    scores : ndarray, shape (n, n_members)
    cut : Truncation
    features : ndarray, shape (n, n_features)
    """
    for begin in range(0, max(len(samples), 1), CHUNK):
        chunk = samples[begin : begin + CHUNK]

        def within(stage: str, done: int, total: int, begin: int = begin) -> None:
            share = done / total if total else 1.0
            progress(stage, begin + int(share * len(chunk)), len(samples))  # noqa: B023

        cut = Truncation.none(len(chunk))
        columns: dict[int, NDArray[np.float64]] = {}
        read = []
        with asked_ahead(scorers, chunk) as asked:
            for scorer in scorers:
                if id(scorer) in asked:
                    continue
                columns[id(scorer)], more, features = _read(scorer, chunk, pool, within)
                cut |= more
                if features is not None:
                    read.append(features)
            columns |= {key: waited() for key, waited in asked.items()}
        scores = np.concatenate([columns[id(scorer)] for scorer in scorers], axis=1)
        yield scores, cut, np.concatenate(read, axis=1)


def features_in_chunks(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    *,
    pool: ModelPool | None = None,
    progress: Progress,
) -> Iterator[NDArray[np.float64]]:
    """Yield the features of all scorers that have some, (n, n_features) each, in chunks."""
    for begin in range(0, max(len(samples), 1), CHUNK):
        chunk = samples[begin : begin + CHUNK]
        columns = []
        for scorer in scorers:
            with nullcontext() if pool is None or not scorer.has_model else pool.using(scorer):
                features = scorer.features(chunk)
            if features is not None:
                columns.append(check_features(scorer, features, len(chunk)))
        progress("scoring", begin + len(chunk), len(samples))
        yield np.concatenate(columns, axis=1)


def _read(
    scorer: Scorer, samples: Sequence[Sample], pool: ModelPool | None, progress: Progress
) -> tuple[NDArray[np.float64], Truncation, NDArray[np.float64] | None]:
    n = len(samples)
    with nullcontext() if pool is None else pool.using(scorer):
        found = scorer.score_detailed(samples, features=True, progress=progress)
    features = None if found.features is None else check_features(scorer, found.features, n)
    return check_scores(scorer, found.scores, n), found.truncation, features
