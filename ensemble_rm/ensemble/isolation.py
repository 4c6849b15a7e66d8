"""Score many samples at once, such that one that fails fails alone.

Knows ensembles and samples; knows nothing of loops or servers, nor what they make of a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.data.samples import Sample
from ensemble_rm.ensemble.results import Scores
from ensemble_rm.errors import RemoteActivationError, RemoteRefusalError, RemoteUnavailableError
from ensemble_rm.members.encoding import Truncation
from ensemble_rm.members.scorer import MemberScores, PendingScores, Scorer, check_scores

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

Failure = TypeVar("Failure", bound=BaseException)

# Of a server, whichever sample is asked about.
_ALL = (RemoteUnavailableError, RemoteRefusalError, RemoteActivationError)


def score_apart(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample],
    *,
    failures: tuple[type[Failure], ...],
) -> Iterator[tuple[range, Scores | Failure]]:
    """Score all at once; where that fails, halve until the culprits stand alone.

    A score that is missing is the aggregator's to judge, row by row: no member is asked again.
    A server that a member lives on, and that is out of reach, refuses or gives no raw logits, fails
    all samples alike: they are not halved, since each part would wait for the whole deadline again.
    Members on other servers are asked about each sample once, whatever the others fail at.

    Parameters
    ----------
    ensemble : RewardEnsemble
    samples : sequence of Sample
    failures : tuple of exception types
        What makes one sample fail; anything else passes through.

    Yields
    ------
    tuple of (range, Scores or one of failures)
        Every sample once, in their order: places that were scored together and their scores, or
        the place of one sample and its error.
    """
    with asking_once(ensemble.scorers) as scorers:
        yield from _apart(replace(ensemble, scorers=scorers), samples, failures)


def _apart(
    ensemble: RewardEnsemble, samples: Sequence[Sample], failures: tuple[type[Failure], ...]
) -> Iterator[tuple[range, Scores | Failure]]:
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
    failures: tuple[type[Failure], ...],
) -> Iterator[tuple[range, Scores | Failure]]:
    """Aggregate all rows at once; where that fails, each by itself."""

    def scores(at: slice) -> Scores:
        reward = ensemble.aggregator(members[at])
        truncation = Truncation(cut.prompts[at], cut.completions[at])
        return Scores(ensemble.names, members[at], raw[at], reward, truncation)

    try:
        whole = scores(slice(None))
    except failures:
        for i, row in enumerate(rows):
            found: Scores | Failure
            try:
                found = scores(slice(i, i + 1))
            except failures as error:
                found = error
            yield range(row, row + 1), found
    else:
        yield rows, whole


# Members on other servers ------------------------------------------------------------------------


@contextmanager
def asking_once(scorers: Sequence[Scorer]) -> Iterator[tuple[Scorer, ...]]:
    """Let members on other servers keep what they were asked; in the end the rest is given up.

    Parameters
    ----------
    scorers : sequence of Scorer
        Others stay as they are.
    """
    kept = tuple(AskedOnce(one) if one.address is not None else one for one in scorers)
    try:
        yield kept
    finally:
        for one in kept:
            if isinstance(one, AskedOnce):
                one.give_up()


class AskedOnce(Scorer):
    """A member on another server that is asked about each sample once.

    Parameters
    ----------
    scorer : Scorer
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer, self.names = scorer, scorer.names
        self._asked: list[_Asked] = []
        self._places: dict[Sample, tuple[_Asked, int]] = {}

    def score(self, samples: Sequence[Sample]) -> Floats:
        """Return (n_samples, n_members) raw scores."""
        return self.begin(samples).result().scores

    @property
    def address(self) -> str | None:
        """The scorer's."""
        return self._scorer.address

    def begin(self, samples: Sequence[Sample]) -> PendingScores:
        """Ask about the samples that are new."""
        new = [sample for sample in dict.fromkeys(samples) if sample not in self._places]
        if new:
            self._asked.append(_Asked(self._scorer, new))
            self._places |= {sample: (self._asked[-1], row) for row, sample in enumerate(new)}
        return _Rows([self._places[sample] for sample in samples], len(self.names))

    def give_up(self) -> None:
        """Wait no longer for what was asked."""
        for one in self._asked:
            one.pending.cancel()


class _Asked:
    """Samples that were asked about together, and what came of it: once, be it an error."""

    def __init__(self, scorer: Scorer, samples: Sequence[Sample]) -> None:
        self._scorer, self._n = scorer, len(samples)
        pending = scorer.begin(samples)
        assert pending is not None
        self.pending = pending

    @cached_property
    def found(self) -> Floats | Exception:
        """All rows, or why there are none."""
        try:
            return check_scores(self._scorer, self.pending.result().scores, self._n)
        except Exception as error:  # noqa: BLE001 - raised to each who asks
            return error


class _Rows:
    """Scores of samples that were asked about at several times."""

    def __init__(self, places: Sequence[tuple[_Asked, int]], k: int) -> None:
        self._places, self._k = places, k

    def result(self) -> MemberScores:
        rows = np.empty((len(self._places), self._k))
        for place, (asked, row) in enumerate(self._places):
            if isinstance(asked.found, Exception):
                raise asked.found
            rows[place] = asked.found[row]
        return MemberScores(rows, Truncation.none(len(rows)))

    def cancel(self) -> None:
        """Nothing: who scores the same samples again wants the answers."""
