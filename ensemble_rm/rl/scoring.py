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
from ensemble_rm.errors import DataError, OptionError, ScoringError, TemplateError
from ensemble_rm.samples import Sample

if TYPE_CHECKING:
    from ensemble_rm.ensemble import RewardEnsemble

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
    failures : tuple of (str or None)
        Why a sample has no reward.
    """

    reward: Floats
    members: Floats
    reference_reward: Floats
    failures: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.reward)

    def listed(self) -> list[float | None]:
        """Return the rewards as loops take them: floats, and None for failed samples."""
        return [
            None if reason is not None else float(value)
            for value, reason in zip(self.reward, self.failures, strict=True)
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
    n, k = len(samples), len(ensemble.names)
    asked = [(i, s) for i, s in enumerate(samples) if isinstance(s, Sample)]
    errors: dict[int, Exception] = {
        i: s for i, s in enumerate(samples) if not isinstance(s, Sample)
    }
    references: dict[Sample, int] = {}
    if with_references:
        for _, s in asked:
            if s.reference is not None:
                # A baseline is subtracted from the reference's score as from any other.
                references.setdefault(Sample(s.prompt, s.reference, s.reference), len(references))
    found = _Found(n + len(references), k)
    _score(ensemble, [*asked, *((n + j, s) for s, j in references.items())], found)
    errors.update({i: error for i, error in found.errors.items() if i < n})
    if errors and (on_failure == "raise" or len(errors) == n):
        raise errors[min(errors)]
    reference_reward = np.full(n, np.nan)
    for i, s in asked:
        if with_references and s.reference is not None:
            place = references[Sample(s.prompt, s.reference, s.reference)]
            reference_reward[i] = found.reward[n + place]
    failures = tuple(
        f"{type(errors[i]).__name__}: {errors[i]}" if i in errors else None for i in range(n)
    )
    return LoopRewards(found.reward[:n], found.members[:n], reference_reward, failures)


class _Found:
    """Rewards as they come in."""

    def __init__(self, n: int, k: int) -> None:
        self.reward = np.full(n, np.nan)
        self.members = np.full((n, k), np.nan)
        self.errors: dict[int, Exception] = {}


def _score(ensemble: RewardEnsemble, asked: Sequence[tuple[int, Sample]], found: _Found) -> None:
    """Score all at once; where that fails, halve until the culprits stand alone."""
    if not asked:
        return
    try:
        scores = ensemble.score([sample for _, sample in asked])
    except FAILURES as error:
        if len(asked) == 1:
            found.errors[asked[0][0]] = error
            return
        middle = len(asked) // 2
        _score(ensemble, asked[:middle], found)
        _score(ensemble, asked[middle:], found)
        return
    rows = [i for i, _ in asked]
    found.reward[rows] = scores.reward
    found.members[rows] = scores.members
