"""Samples → rewards for a loop, with a stated policy for those that fail.

A failed sample has no reward: None, never 0.0, on which a policy would be trained. Knows ensembles
and samples; knows nothing of any trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import DataError, OptionError, ScoringError, TemplateError

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

FailurePolicy: TypeAlias = Literal["none", "raise"]
FAILURES = (ScoringError, DataError, TemplateError)
"""What makes one sample fail; anything else is a broken loop and passes through."""


@dataclass(frozen=True, eq=False)
class LoopRewards:
    """Rewards of a call's samples, in their order.

    Attributes
    ----------
    reward : ndarray, shape (n_samples,)
        In normalised units; NaN where a sample failed.
    members : ndarray, shape (n_samples, n_members)
        Normalised scores; NaN where a sample failed.
    reference_reward : ndarray, shape (n_samples,)
        Of the prompt's reference completion; NaN where there is none or it failed.
    errors : tuple of (Exception or None)
        Why a sample has no reward.
    """

    reward: Floats
    members: Floats
    reference_reward: Floats
    errors: tuple[Exception | None, ...]

    def __len__(self) -> int:
        return len(self.reward)

    def __getitem__(self, rows: slice) -> LoopRewards:
        return LoopRewards(
            self.reward[rows], self.members[rows], self.reference_reward[rows], self.errors[rows]
        )

    @classmethod
    def join(cls, parts: Sequence[LoopRewards]) -> LoopRewards:
        """Return the rewards of several calls, in their order."""
        return cls(
            np.concatenate([part.reward for part in parts]),
            np.concatenate([part.members for part in parts]),
            np.concatenate([part.reference_reward for part in parts]),
            tuple(error for part in parts for error in part.errors),
        )

    @property
    def failures(self) -> tuple[str | None, ...]:
        """The errors in words; None where a sample has a reward."""
        return tuple(None if e is None else f"{type(e).__name__}: {e}" for e in self.errors)

    def listed(self) -> list[float | None]:
        """Return the rewards as loops take them: floats, and None for failed samples."""
        return [
            float(value) if error is None else None
            for value, error in zip(self.reward, self.errors, strict=True)
        ]


def check_policy(on_failure: str) -> None:
    """Raise `OptionError` where no policy for failed samples has that name."""
    if on_failure not in ("none", "raise"):
        raise OptionError(f"on_failure must be 'none' or 'raise', not {on_failure!r}")


def score_for_loop(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample | Exception],
    *,
    on_failure: FailurePolicy = "none",
    with_references: bool = False,
) -> LoopRewards:
    """Score a call's samples; each one that cannot be scored fails alone.

    Parameters
    ----------
    ensemble : RewardEnsemble
    samples : sequence of Sample or Exception
        An exception stands for a sample that could not be read.
    on_failure : {"none", "raise"}
        Whether a failed sample has no reward, or ends the run.
    with_references : bool
        Whether the samples' reference completions are scored, too: each once.

    Returns
    -------
    LoopRewards

    Raises
    ------
    EnsembleRMError
        The first sample's own error, under ``"raise"``, and where every sample of the call fails:
        that is a broken reward, not a broken sample.
    """
    check_policy(on_failure)
    rewards = score_each(ensemble, samples, with_references=with_references)
    errors = [error for error in rewards.errors if error is not None]
    if errors and (on_failure == "raise" or len(errors) == len(rewards)):
        raise errors[0]
    return rewards


def score_each(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample | Exception],
    *,
    with_references: bool = False,
) -> LoopRewards:
    """Score samples as `score_for_loop` does, and leave every failure to the caller."""
    n, k = len(samples), len(ensemble.names)
    asked = [(i, s) for i, s in enumerate(samples) if isinstance(s, Sample)]
    # A baseline is subtracted from the reference's score as from any other.
    below = {
        i: Sample(s.prompt, s.reference, s.reference)
        for i, s in asked
        if with_references and s.reference is not None
    }
    references = list(dict.fromkeys(below.values()))
    scores = ensemble.score([*(s for _, s in asked), *references], on_error="record")
    failed = dict(scores.failed)
    for error in failed.values():
        if not isinstance(error, FAILURES):
            raise error
    rows, m = [i for i, _ in asked], len(asked)
    reward, members = np.full(n, np.nan), np.full((n, k), np.nan)
    reward[rows], members[rows] = scores.reward[:m], scores.members[:m]
    place = {reference: m + j for j, reference in enumerate(references)}
    reference_reward = np.full(n, np.nan)
    for i, reference in below.items():
        reference_reward[i] = scores.reward[place[reference]]
    errors = {i: s for i, s in enumerate(samples) if not isinstance(s, Sample)}
    errors |= {rows[row]: error for row, error in failed.items() if row < m}
    return LoopRewards(reward, members, reference_reward, tuple(errors.get(i) for i in range(n)))
