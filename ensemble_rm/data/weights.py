"""Weights of samples that were drawn with unequal probabilities.

Knows nothing of how pairs are chosen, of judgments or of fits.

References
----------
.. [1] Horvitz & Thompson 1952: each drawn item represents 1/π items.
.. [2] Hájek 1971: weights scaled to a known sum.
.. [3] Kish 1965: the effective sample size of unequal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble_rm.errors import OptionError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SampleWeights:
    """The weight of each drawn item, and the effective size of the sample.

    Attributes
    ----------
    weights : ndarray, shape (n,)
        Of mean 1 in every design.
    effective : float
        Kish's effective size [3]_: the number of draws with equal probabilities that carries as
        much information.
    """

    weights: Floats
    effective: float

    @property
    def remark(self) -> str:
        """One line for a person: what the weights cost."""
        n = len(self.weights)
        # ptp ≤ 1e-9: weights that were scaled to mean 1 differ by rounding.
        if n == 0 or np.ptp(self.weights) <= 1e-9:
            return f"{n} with equal weights"
        return (
            f"{n} with weights {self.weights.min():.2g} to {self.weights.max():.2g} count as "
            f"{self.effective:.1f} drawn with equal probabilities"
        )


def sample_weights(weights: ArrayLike) -> SampleWeights:
    """Return given weights, such as `Preferences.weights`, scaled to mean 1.

    Parameters
    ----------
    weights : array_like, shape (n,)
        All > 0.

    Returns
    -------
    SampleWeights

    Raises
    ------
    OptionError
        If a weight is not a finite number > 0.
    """
    effective = effective_sample_size(weights)
    w = np.asarray(weights, dtype=np.float64)
    return SampleWeights(w / w.mean() if len(w) else w, effective)


def effective_sample_size(weights: ArrayLike) -> float:
    """Return Kish's effective sample size, (Σw)²/Σw² [3]_.

    Parameters
    ----------
    weights : array_like, shape (n,)
        All > 0.

    Returns
    -------
    float
        Between 1 and n: n for equal weights, 0 for an empty vector.

    Raises
    ------
    OptionError
        If a weight is not a finite number > 0.
    """
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or not (np.isfinite(w).all() and (w > 0).all()):
        raise OptionError(f"weights must be a vector of finite numbers > 0, not {weights!r}")
    if len(w) == 0:
        return 0.0
    # Scaled first: squares of very large weights would overflow.
    w = w / w.max()
    return float(w.sum() ** 2 / (w**2).sum())


def inclusion_weights(
    inclusion: Sequence[float | None] | ArrayLike,
    designs: Sequence[object] | NDArray[Any] | None = None,
) -> SampleWeights:
    """Return weights 1/π from inclusion probabilities [1]_, of mean 1 in every design [2]_.

    With 1/π alone, a pair from a pool of a million would outweigh all pairs from a pool of a
    thousand; scaled, each design counts as often as it was drawn from.

    Parameters
    ----------
    inclusion : sequence of (float or None), shape (n,)
        Probability π in (0, 1] with which each item was drawn; None (or NaN) if all of its design
        had equal probabilities.
    designs : sequence or ndarray, optional
        The draw that each belongs to, such as its batch; a single one for all by default.

    Returns
    -------
    SampleWeights

    Raises
    ------
    OptionError
        If a probability is not in (0, 1], or a design has items with and without one.
    """
    pi = np.array(inclusion, dtype=np.float64)  # None becomes NaN
    known = ~np.isnan(pi)
    if not ((pi[known] > 0) & (pi[known] <= 1)).all():
        bad = pi[known][~((pi[known] > 0) & (pi[known] <= 1))][0]
        raise OptionError(f"an inclusion probability must lie in (0, 1], not {bad!r}")
    numbers = _numbered([None] * len(pi) if designs is None else designs)
    if len(numbers) != len(pi):
        raise OptionError(f"{len(numbers)} designs for {len(pi)} inclusion probabilities")
    counts = np.bincount(numbers)
    with_pi = np.bincount(numbers[known], minlength=len(counts))
    # Half-known designs have no common scale: 1/π and 1 cannot be compared.
    mixed = np.flatnonzero((with_pi > 0) & (with_pi < counts))
    if len(mixed):
        first = int(np.flatnonzero(numbers == mixed[0])[0])
        name = None if designs is None else designs[first]
        raise OptionError(
            f"{with_pi[mixed[0]]} of the {counts[mixed[0]]} of design {name!r} have an inclusion "
            "probability and the others have none; give the others a design of their own"
        )
    weights = 1.0 / np.where(known, pi, 1.0)
    # Mean 1 per design: a design that drew few of many would otherwise outweigh the others.
    weights *= (counts / np.bincount(numbers, weights, minlength=len(counts)))[numbers]
    return SampleWeights(weights, effective_sample_size(weights))


def _numbered(names: Sequence[object] | NDArray[Any]) -> NDArray[np.int64]:
    """Return a number from 0 for each name, the same for equal names."""
    if isinstance(names, np.ndarray):
        return np.asarray(np.unique(names, return_inverse=True)[1], dtype=np.int64)
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def thin_to_equal(inclusion: ArrayLike, *, floor: float, seed: int) -> NDArray[np.bool_]:
    """Keep each drawn item with probability floor/π, so that all have one probability.

    For a test or a gate that takes no weights. Of a draw with a share of random items, at least
    that share is left in expectation.

    Parameters
    ----------
    inclusion : array_like, shape (n,)
        Probability with which each item was drawn.
    floor : float
        The smallest π of the whole population, drawn or not: the new probability.
    seed : int

    Returns
    -------
    ndarray of bool, shape (n,)
        Which items are kept.

    Raises
    ------
    OptionError
        If a probability lies below the floor, or one is not in (0, 1].
    """
    pi = np.asarray(inclusion, dtype=np.float64)
    if not 0 < floor <= 1 or not ((pi >= floor) & (pi <= 1)).all():
        raise OptionError(f"probabilities must lie in [floor, 1], and floor={floor!r} in (0, 1]")
    # A stream of its own: the draw and the order of sides use others of the same seed.
    return np.asarray(np.random.default_rng([seed, 2]).random(len(pi)) * pi < floor)
