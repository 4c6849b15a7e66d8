"""Score many samples at once, such that one that fails fails alone.

Knows ensembles and samples; knows nothing of loops or servers, nor what they make of a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ensemble_rm.errors import RemoteRefusalError, RemoteUnavailableError
from ensemble_rm.samples import Sample

if TYPE_CHECKING:
    from ensemble_rm.ensemble import RewardEnsemble
    from ensemble_rm.results import Scores

_ALL = (RemoteUnavailableError, RemoteRefusalError)  # of a server, whichever sample is asked about


def score_apart(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample],
    *,
    failures: tuple[type[Exception], ...],
) -> Iterator[tuple[range, Scores | Exception]]:
    """Score all at once; where that fails, halve until the culprits stand alone.

    A server that a member lives on, and that is out of reach or refuses, fails all samples alike:
    they are not halved, since each part would wait for the whole deadline again.

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
            if isinstance(error, _ALL):
                for left in (rows, *reversed(waiting)):
                    yield from ((range(i, i + 1), error) for i in left)
                return
            if len(rows) == 1:
                yield rows, error
                continue
            middle = (rows.start + rows.stop) // 2
            waiting += [range(middle, rows.stop), range(rows.start, middle)]
        else:
            yield rows, scores
