"""Score many samples at once, such that one that fails fails alone.

Knows ensembles and samples; knows nothing of loops or servers, nor what they make of a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ensemble_rm.samples import Sample

if TYPE_CHECKING:
    from ensemble_rm.ensemble import RewardEnsemble
    from ensemble_rm.results import Scores


def score_apart(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample],
    *,
    failures: tuple[type[Exception], ...],
) -> Iterator[tuple[range, Scores | Exception]]:
    """Score all at once; where that fails, halve until the culprits stand alone.

    Parameters
    ----------
    ensemble : RewardEnsemble
    samples : sequence of Sample
    failures : tuple of exception types
        What makes one sample fail; anything else passes through.

    Yields
    ------
    tuple of (range, Scores or Exception)
        Every sample once, in their order: places that were scored together and their scores, or
        the place of one sample and its error.
    """
    waiting = [range(len(samples))] if samples else []
    while waiting:
        rows = waiting.pop()
        try:
            scores = ensemble.score(samples[rows.start : rows.stop])
        except failures as error:
            if len(rows) == 1:
                yield rows, error
                continue
            middle = (rows.start + rows.stop) // 2
            waiting += [range(middle, rows.stop), range(rows.start, middle)]
        else:
            yield rows, scores
