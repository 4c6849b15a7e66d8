"""Prompt baselines: a member's score of each prompt's reference completion.

Knows samples and scorers; what is subtracted from what is the normaliser's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import BaselineError
from ensemble_rm.members.encoding import Truncation
from ensemble_rm.members.scorer import Scorer, check_scores
from ensemble_rm.progress import Progress
from ensemble_rm.scoring.model_pool import ModelPool
from ensemble_rm.scoring.pipeline import score_all
from ensemble_rm.scoring.score_cache import ScoreCache


def reference_samples(samples: Sequence[Sample]) -> tuple[list[Sample], NDArray[np.int64]]:
    """Return each distinct (prompt, reference) once, and the place of every sample's own.

    Raises
    ------
    BaselineError
        If a sample names no reference; the message names its row.
    """
    found: dict[Sample, int] = {}
    places = []
    for row, sample in enumerate(samples):
        if sample.reference is None:
            raise BaselineError(
                f"row {row} has no reference completion, and rewards with a baseline need one of "
                "every prompt; add `reference` to it, or train without a baseline"
            )
        reference = Sample(sample.prompt, sample.reference)
        places.append(found.setdefault(reference, len(found)))
    return list(found), np.array(places, dtype=np.int64)


def baseline_scores(scorer: Scorer, samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Return the raw score of each sample's reference, shape (n_samples, n_members)."""
    references, places = reference_samples(samples)
    scores = check_scores(scorer, scorer.score(references), len(references))
    return scores[places]


def score_with_references(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    *,
    cache: ScoreCache | None = None,
    pool: ModelPool | None = None,
    progress: Progress,
) -> tuple[NDArray[np.float64], NDArray[np.float64], Truncation]:
    """Return the raw scores of samples and of each one's reference, both (n_samples, n_members).

    Everything is scored in one go, as by `score_all`; what was cut covers the references, too.

    Raises
    ------
    BaselineError
        If a sample names no reference; the message names its row.
    """
    references, places = reference_samples(samples)
    every = [*samples, *references]
    raw, cut = score_all(scorers, every, cache=cache, pool=pool, progress=progress)
    return raw[: len(samples)], raw[len(samples) :][places], cut
