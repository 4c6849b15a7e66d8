"""Scores of samples that may fail: the arrays of `Scores`, and the errors of failed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ensemble_rm.data.samples import Sample
from ensemble_rm.ensemble.isolation import score_apart
from ensemble_rm.ensemble.results import Scores
from ensemble_rm.members.encoding import Truncation

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble


@dataclass(frozen=True, eq=False)
class RecordedScores(Scores):
    """Scores whose failed rows are NaN, with the error of each in `failed`."""

    failed: Mapping[int, Exception] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reward)

    def __getitem__(self, rows: slice) -> RecordedScores:
        start, stop, _ = rows.indices(len(self))
        return RecordedScores(
            self.names,
            self.members[rows],
            self.raw[rows],
            self.reward[rows],
            Truncation(self.truncation.prompts[rows], self.truncation.completions[rows]),
            {row - start: error for row, error in self.failed.items() if start <= row < stop},
        )

    @classmethod
    def join(cls, parts: Sequence[RecordedScores]) -> RecordedScores:
        """Return the scores of all parts, in their order."""
        starts = np.cumsum([0, *(len(part) for part in parts)])
        return cls(
            parts[0].names,
            np.concatenate([part.members for part in parts]),
            np.concatenate([part.raw for part in parts]),
            np.concatenate([part.reward for part in parts]),
            Truncation(
                np.concatenate([part.truncation.prompts for part in parts]),
                np.concatenate([part.truncation.completions for part in parts]),
            ),
            {
                int(start) + row: error
                for start, part in zip(starts, parts, strict=False)
                for row, error in part.failed.items()
            },
        )


def score_recorded(ensemble: RewardEnsemble, samples: Sequence[Sample]) -> RecordedScores:
    """Score samples; those that fail, for whatever reason, are in `errors`."""
    from ensemble_rm.server.scheduling.threads import as_failure

    n, k = len(samples), len(ensemble.names)
    members, raw, reward = np.full((n, k), np.nan), np.full((n, k), np.nan), np.full(n, np.nan)
    cut = Truncation.none(n)
    errors: dict[int, Exception] = {}
    # A panic in Rust, such as a tokenizer's, is no `Exception`.
    for rows, scores in score_apart(ensemble, samples, failures=(BaseException,)):
        if isinstance(scores, BaseException):
            errors[rows[0]] = scores if isinstance(scores, Exception) else as_failure(scores)
            continue
        at = slice(rows.start, rows.stop)
        members[at], raw[at], reward[at] = scores.members, scores.raw, scores.reward
        cut.prompts[at], cut.completions[at] = (
            scores.truncation.prompts,
            scores.truncation.completions,
        )
    return RecordedScores(ensemble.names, members, raw, reward, cut, errors)
