"""Score many samples at once, such that one that fails fails alone.

Knows ensembles and samples; knows nothing of loops or servers, nor what they make of a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.errors import RemoteActivationError, RemoteRefusalError, RemoteUnavailableError
from ensemble_rm.members.text import Truncation
from ensemble_rm.results import Scores
from ensemble_rm.samples import Sample

if TYPE_CHECKING:
    from ensemble_rm.ensemble import RewardEnsemble

# Of a server, whichever sample is asked about.
_ALL = (RemoteUnavailableError, RemoteRefusalError, RemoteActivationError)


def score_apart(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample],
    *,
    failures: tuple[type[Exception], ...],
) -> Iterator[tuple[range, Scores | Exception]]:
    """Score all at once; where that fails, halve until the culprits stand alone.

    A score that is missing is the aggregator's to judge, row by row: no member is asked again.
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
            found = ensemble.score_members(samples[rows.start : rows.stop])
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
            yield from _rewarded(ensemble, rows, *found, failures)


def _rewarded(
    ensemble: RewardEnsemble,
    rows: range,
    raw: Floats,
    members: Floats,
    cut: Truncation,
    failures: tuple[type[Exception], ...],
) -> Iterator[tuple[range, Scores | Exception]]:
    """Aggregate all rows at once; where that fails, each by itself."""

    def scores(at: slice) -> Scores:
        reward = ensemble.aggregator(members[at])
        truncation = Truncation(cut.prompts[at], cut.completions[at])
        return Scores(ensemble.names, members[at], raw[at], reward, truncation)

    try:
        whole = scores(slice(None))
    except failures:
        for i, row in enumerate(rows):
            found: Scores | Exception
            try:
                found = scores(slice(i, i + 1))
            except failures as error:
                found = error
            yield range(row, row + 1), found
    else:
        yield rows, whole
