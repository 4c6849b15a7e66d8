"""Samples → rewards for a training loop, with a rule for samples that fail.

A failed sample has the reward None, never 0.0, which a policy would be trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from ensemble_rm.arrays import Floats
from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import DataError, OptionError, ScoringError, TemplateError

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

FailurePolicy: TypeAlias = Literal["none", "raise"]
FAILURES = (ScoringError, DataError, TemplateError)
"""Errors of one sample; any other means that the reward is broken, and is raised."""


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
        Reward of the prompt's reference completion; NaN where there is none or it failed.
    failed : mapping of int to Exception
        By row, why a sample has no reward.
    """

    reward: Floats
    members: Floats
    reference_reward: Floats
    failed: Mapping[int, Exception] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reward)

    def __getitem__(self, rows: slice) -> LoopRewards:
        start, stop, _ = rows.indices(len(self))
        failed = {row - start: e for row, e in self.failed.items() if start <= row < stop}
        return LoopRewards(
            self.reward[rows], self.members[rows], self.reference_reward[rows], failed
        )

    @classmethod
    def join(cls, parts: Sequence[LoopRewards]) -> LoopRewards:
        """Return the rewards of several calls, in their order."""
        starts = np.cumsum([0, *map(len, parts)]).tolist()
        return cls(
            np.concatenate([part.reward for part in parts]),
            np.concatenate([part.members for part in parts]),
            np.concatenate([part.reference_reward for part in parts]),
            {
                start + row: error
                for start, part in zip(starts, parts, strict=False)
                for row, error in part.failed.items()
            },
        )

    @property
    def failures(self) -> tuple[str | None, ...]:
        """The error of each sample as text; None where it has a reward."""
        errors = [self.failed.get(row) for row in range(len(self))]
        return tuple(None if e is None else f"{type(e).__name__}: {e}" for e in errors)

    def listed(self) -> list[float | None]:
        """Return the rewards as trainers take them: floats, and None for failed samples."""
        rewards: list[float] = self.reward.tolist()
        return [None if row in self.failed else value for row, value in enumerate(rewards)]


def check_policy(on_failure: str) -> None:
    """Raise `OptionError` unless `on_failure` is "none" or "raise"."""
    if on_failure not in ("none", "raise"):
        raise OptionError(f"on_failure must be 'none' or 'raise', not {on_failure!r}")


def score_for_loop(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample | Exception],
    *,
    on_failure: FailurePolicy = "none",
    with_references: bool = False,
) -> LoopRewards:
    """Score the samples of one call of a training loop; a failure does not affect other samples.

    Parameters
    ----------
    ensemble : RewardEnsemble
    samples : sequence of Sample or Exception
        An exception is a sample that could not be read.
    on_failure : {"none", "raise"}
        Whether a failed sample has no reward, or ends the run.
    with_references : bool
        Whether to score the samples' reference completions as well, each distinct one once.

    Returns
    -------
    LoopRewards

    Raises
    ------
    EnsembleRMError
        The error of the first failed sample, under ``"raise"``; also if every sample of the call
        fails, since then the reward is broken.
    Exception
        An error of a member that is not about one sample, such as a bug or an unreachable server.
    """
    check_policy(on_failure)
    rewards = score_each(ensemble, samples, with_references=with_references)
    # With no reward at all the loop would train on nothing, silently.
    if rewards.failed and (on_failure == "raise" or len(rewards.failed) == len(rewards)):
        raise rewards.failed[min(rewards.failed)]
    return rewards


def score_each(
    ensemble: RewardEnsemble,
    samples: Sequence[Sample | Exception],
    *,
    with_references: bool = False,
) -> LoopRewards:
    """Score samples as `score_for_loop` does, and leave every failed sample to the caller."""
    n, k = len(samples), len(ensemble.names)
    failed = {row: s for row, s in enumerate(samples) if not isinstance(s, Sample)}
    readable = [(row, s) for row, s in enumerate(samples) if isinstance(s, Sample)]
    # If the normaliser has a baseline, it is subtracted from a reference's own score as well.
    reference_of = {
        row: Sample(s.prompt, s.reference, s.reference)
        for row, s in readable
        if with_references and s.reference is not None
    }
    # Many samples share one reference, which is scored once.
    references = list(dict.fromkeys(reference_of.values()))
    m = len(readable)
    # One call for both, so that samples and references share batches and prefixes.
    scores = ensemble.score([*(s for _, s in readable), *references], on_error="record")
    for error in scores.failed.values():
        if not isinstance(error, FAILURES):
            # A broken reward must end the run; only a sample's own failure is passed on.
            raise error
    rows = [row for row, _ in readable]
    reward, members = np.full(n, np.nan), np.full((n, k), np.nan)
    reward[rows], members[rows] = scores.reward[:m], scores.members[:m]
    failed |= {rows[i]: error for i, error in scores.failed.items() if i < m}
    # A failed reference has no reward; the samples that name it keep theirs.
    place = {reference: m + i for i, reference in enumerate(references)}
    reference_reward = np.full(n, np.nan)
    for row, reference in reference_of.items():
        reference_reward[row] = scores.reward[place[reference]]
    return LoopRewards(reward, members, reference_reward, dict(sorted(failed.items())))
