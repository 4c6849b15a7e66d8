"""What the scoring thread says of samples, as requests read it: numbers, or the error of each.

Knows scores and arrays; knows nothing of HTTP, wire formats or batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import EnsembleRMError
from ensemble_rm.uncertainty.disagreement import member_std

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One sample's numbers.

    Attributes
    ----------
    reward : float
        In normalised units; finite.
    members, raw : ndarray, shape (n_members,)
        Normalised scores, and as the members gave them; NaN where a member is missing and the
        aggregator leaves it out.
    prompt_cut, completion_cut : bool
        Whether a member read less than the whole.
    """

    reward: float
    members: Floats
    raw: Floats
    prompt_cut: bool
    completion_cut: bool

    @property
    def std(self) -> float | None:
        """Spread of the members that are there (ddof 1); None of one alone, or beyond a float."""
        if len(self.members) < 2:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            spread = float(member_std(self.members[None], nan="omit")[0])
        return spread if math.isfinite(spread) else None


Outcome: TypeAlias = Scored | Exception


class SampleError(Exception):
    """A sample of a request has no reward, by the error that is its cause.

    Attributes
    ----------
    place : int
        Which sample.
    """

    def __init__(self, place: int, cause: Exception) -> None:
        super().__init__(f"sample {place}: {type(cause).__name__}")
        self.place, self.__cause__ = place, cause


def score_outcomes(ensemble: RewardEnsemble, samples: Sequence[Sample]) -> list[Outcome]:
    """Score samples; one that fails, for whatever reason, has its error in its place.

    Returns
    -------
    list of (Scored or Exception)
        In the order of the samples.
    """
    scores = ensemble.score(samples, on_error="record")
    cut, failed = scores.truncation, scores.failed
    return [
        failed[i]
        if i in failed
        else Scored(
            float(scores.reward[i]),
            scores.members[i],
            scores.raw[i],
            bool(cut.prompts[i]),
            bool(cut.completions[i]),
        )
        for i in range(len(samples))
    ]


def first_error(outcomes: Sequence[object]) -> tuple[int, Exception] | None:
    """Return the place and the error of the first sample that failed; None where none did."""
    return next(((i, o) for i, o in enumerate(outcomes) if isinstance(o, Exception)), None)


def say_error(error: Exception) -> str:
    """Say what went wrong by the error's name and meaning; its message may quote the request."""
    name = type(error).__name__
    if not isinstance(error, EnsembleRMError):
        return name
    meaning = (type(error).__doc__ or "").strip().splitlines()
    return f"{name}: {meaning[0]}" if meaning else name
