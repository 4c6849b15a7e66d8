"""Members' raw scores in one unit: one offset and one scale per member.

Fitted once, at training, on reference completions; never part of a calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble_rm.aggregation.aggregator import NanPolicy, score_matrix
from ensemble_rm.arrays import Floats
from ensemble_rm.errors import BaselineError, NonFiniteScoreError, OptionError
from ensemble_rm.saved_json import from_row


@dataclass(frozen=True)
class Normaliser:
    """Subtract each member's prompt baseline, where there is one, and offset; divide by its scale.

    Attributes
    ----------
    offset, scale : tuple of float
        One per member, in the member's own unit; scales are > 0.
    baseline : bool
        Whether a member's score of the prompt's reference completion is subtracted first. That
        removes what a Bradley–Terry score does not determine: any function of the prompt.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    baseline: bool = False

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.scale) or not self.offset:
            raise OptionError(f"{len(self.offset)} offsets and {len(self.scale)} scales")
        # A scale of 0 would turn scores into infinities.
        if not np.isfinite(self.offset + self.scale).all() or min(self.scale) <= 0:
            raise OptionError(f"offsets must be finite and scales > 0, not {self}")

    def __call__(self, scores: ArrayLike, baseline: ArrayLike | None = None) -> Floats:
        """Return (n_samples, n_members) normalised scores; NaN stays NaN.

        Parameters
        ----------
        scores : array_like, shape (n_samples, n_members)
            Raw scores.
        baseline : array_like, shape (n_samples, n_members), optional
            Raw scores of each sample's reference completion; required with a baseline.
        """
        if self.baseline and baseline is None:
            # A reward without its baseline is off by a prompt's own level, silently.
            raise BaselineError(
                "this normaliser subtracts a baseline; pass the scores of the references"
            )
        if not self.baseline and baseline is not None:
            raise OptionError("this normaliser has no baseline; do not pass scores of references")
        matrix = score_matrix(scores)
        if matrix.shape[1] != len(self.offset):
            raise OptionError(
                f"{matrix.shape[1]} columns for a normaliser of {len(self.offset)} members"
            )
        above = _above(matrix, baseline)
        normalised: Floats = (above - np.array(self.offset)) / np.array(self.scale)
        return normalised

    @classmethod
    def identity(cls, members: int) -> Normaliser:
        """Return the normaliser that changes nothing."""
        return cls((0.0,) * members, (1.0,) * members)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return {
            "offset": list(self.offset),
            "scale": list(self.scale),
            "baseline": self.baseline,
        }

    @classmethod
    def from_json(cls, d: Any) -> Normaliser:
        """Read what `to_json` wrote, else `SchemaError`; older files have no baseline."""
        return from_row(cls, d)


def _above(matrix: Floats, baseline: ArrayLike | None) -> Floats:
    if baseline is None:
        return matrix
    below = score_matrix(baseline)
    if below.shape != matrix.shape:
        raise OptionError(f"a baseline of shape {below.shape} for scores of shape {matrix.shape}")
    return matrix - below


def fit_normaliser(
    scores: ArrayLike,
    groups: ArrayLike,
    *,
    baseline: ArrayLike | None = None,
    nan: NanPolicy = "raise",
) -> Normaliser:
    """Fit offset (the mean) and scale (the RMS deviation within prompts) of each member.

    A Bradley–Terry score is fixed only up to a function of the prompt, so a global standard
    deviation would be dominated by arbitrary offsets.

    Parameters
    ----------
    scores : array_like, shape (n_samples, n_members)
        Raw scores of reference completions.
    groups : array_like of int, shape (n_samples,)
        Prompt of each sample; at least one prompt has two completions that differ in score.
    baseline : array_like, shape (n_samples, n_members), optional
        Raw scores of the reference completion of each sample's prompt, which the normaliser will
        subtract.
    nan : {"raise", "omit"}
        Whether a NaN score is an error or left out of its member's offset and scale.

    Returns
    -------
    Normaliser
        One offset and scale per column.

    Raises
    ------
    NonFiniteScoreError
        If a score is infinite, or is NaN against `nan`.
    OptionError
        If a member scores all completions of each prompt alike, or no two of any prompt.
    """
    matrix = _above(score_matrix(scores), baseline)
    # np.unique numbers the prompts 0, 1, …, as bincount needs them.
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    fits = [_fit_member(i, column, labels, nan) for i, column in enumerate(matrix.T)]
    offset, scale = zip(*fits, strict=True)
    return Normaliser(offset, scale, baseline is not None)


def _fit_member(
    member: int, scores: Floats, labels: NDArray[np.intp], nan: NanPolicy
) -> tuple[float, float]:
    """Return one member's offset and scale."""
    present = ~np.isnan(scores) if nan == "omit" else np.ones(len(scores), dtype=np.bool_)
    x, labels = scores[present], labels[present]
    if not np.isfinite(x).all():
        raise NonFiniteScoreError(
            f"reference scores of member {member} are NaN or infinite; an aggregator with "
            "nan='omit' leaves NaN out"
        )
    counts = np.bincount(labels)
    sums = np.bincount(labels, x)
    # Deviations from the prompt's mean, shape (n_samples,).
    within = x - (sums / np.maximum(counts, 1))[labels]
    # A prompt with one completion has deviation 0 and says nothing about the spread.
    several = counts[labels] > 1
    # Pooled within-group variance: each prompt's mean costs one degree of freedom.
    freedom = int(several.sum() - (counts > 1).sum())
    if freedom == 0:
        raise OptionError(
            f"no prompt has two reference completions that member {member} scored, so its scale "
            "within prompts is undefined"
        )
    scale = float(np.sqrt((within[several] ** 2).sum() / freedom))
    # Relative to the scores' size: rounding noise of a constant member is not a scale.
    if scale <= 1e-12 * max(float(np.abs(x).max()), 1e-30):
        raise OptionError(f"member {member} gives all completions of a prompt the same score")
    return float(x.mean()), scale
