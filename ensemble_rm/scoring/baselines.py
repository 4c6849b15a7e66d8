"""Prompt baselines: which reference completion each sample's score is compared with.

A baseline is a member's score of the prompt's reference completion; the normaliser subtracts it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import BaselineError
from ensemble_rm.members.scorer import Scorer, check_scores


def missing_references(samples: Sequence[Sample]) -> dict[int, BaselineError]:
    """Return, by row, an error for each sample without a reference completion."""
    return {
        row: BaselineError(
            f"row {row} has no reference completion, and rewards with a baseline need one of "
            "every prompt; add `reference` to it, or train without a baseline"
        )
        for row, sample in enumerate(samples)
        if sample.reference is None
    }


def reference_samples(samples: Sequence[Sample]) -> tuple[list[Sample], NDArray[np.int64]]:
    """Return the distinct (prompt, reference) samples, and each sample's row among them.

    Raises
    ------
    BaselineError
        If a sample has no reference; the message names its row.
    """
    for error in missing_references(samples).values():
        raise error
    rows: dict[Sample, int] = {}
    references = [Sample(sample.prompt, sample.reference or "") for sample in samples]
    own = [rows.setdefault(reference, len(rows)) for reference in references]
    return list(rows), np.array(own, dtype=np.int64)


def baseline_scores(scorer: Scorer, samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Return the raw score of each sample's reference, shape (n_samples, n_members)."""
    references, own = reference_samples(samples)
    scores = check_scores(scorer, scorer.score(references), len(references))
    return scores[own]
