"""Scores and features of the same samples, in one pass of the models that have both.

For distances to the training inputs; knows nothing of where those lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.members.encoding import Truncation
from ensemble_rm.members.scorer import (
    FeatureScorer,
    Scorer,
    asked_ahead,
    checked_features,
    checked_scores,
    score_all,
)
from ensemble_rm.progress import Progress
from ensemble_rm.scoring.model_pool import ModelPool

CHUNK = 4096  # samples whose features are in memory at once


@runtime_checkable
class ReadingScorer(FeatureScorer, Protocol):
    """A scorer whose scores and features come of one pass."""

    def score_and_features(
        self, samples: Sequence[Sample], *, progress: Progress
    ) -> tuple[NDArray[np.float64], Truncation, NDArray[np.float64]]:
        """Return the scores, which samples were cut, and the features."""
        ...


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
        At least one of them a FeatureScorer.
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
    blind = [scorer for scorer in scorers if not isinstance(scorer, FeatureScorer)]
    for begin in range(0, max(len(samples), 1), CHUNK):
        chunk = samples[begin : begin + CHUNK]

        def within(stage: str, done: int, total: int, begin: int = begin) -> None:
            share = done / total if total else 1.0
            progress(stage, begin + int(share * len(chunk)), len(samples))  # noqa: B023

        cut = Truncation.none(len(chunk))
        columns: dict[int, NDArray[np.float64]] = {}
        read = []
        with asked_ahead(blind, chunk) as asked:
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


def _read(
    scorer: Scorer, samples: Sequence[Sample], pool: ModelPool | None, progress: Progress
) -> tuple[NDArray[np.float64], Truncation, NDArray[np.float64] | None]:
    n = len(samples)
    if not isinstance(scorer, ReadingScorer):
        scores, cut = score_all([scorer], samples, pool=pool, progress=progress)
        if not isinstance(scorer, FeatureScorer):
            return scores, cut, None
        return scores, cut, checked_features(scorer, scorer.features(samples), n)
    if pool is None:
        scores, cut, features = scorer.score_and_features(samples, progress=progress)
    else:
        with pool.using(scorer):
            scores, cut, features = scorer.score_and_features(samples, progress=progress)
    return checked_scores(scorer, scores, n), cut, checked_features(scorer, features, n)
