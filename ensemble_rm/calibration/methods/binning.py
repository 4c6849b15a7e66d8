"""What the binning calibrators share: one probability per bin of σ(Δ/T), tabulated exactly.

netcal fits the bins. It takes neither votes, nor ties, nor weights, so a judgment is copied in
their proportion, and every copy is seen in both orientations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibrator import CalibrationData, Curve
from ensemble_rm.calibration.methods.isotonic import check_points
from ensemble_rm.errors import OptionError

_MAX_ROWS = 2_000_000  # of copied judgments


@dataclass(frozen=True)
class StepCurve(Curve):
    """One probability per bin of |Δ|.

    Attributes
    ----------
    edges : tuple of float
        Rising margins > 0 between the bins; a margin on an edge belongs to the bin below.
    values : tuple of float
        Probability in each bin, one more than edges.
    """

    edges: tuple[float, ...]
    values: tuple[float, ...]

    shape: ClassVar[str] = "step"

    def __post_init__(self) -> None:
        check_points(self.shape, self.edges, self.values)
        if len(self.edges) + 1 != len(self.values):
            raise OptionError(f"{len(self.values)} probabilities for {len(self.edges)} edges")

    def above(self, sizes: Floats) -> Floats:
        """Return the probability of each margin's bin."""
        return np.asarray(np.array(self.values)[np.searchsorted(self.edges, sizes, side="left")])


FitBins: TypeAlias = Callable[[Floats, NDArray[np.int64]], tuple[Any, set[int]]]


def fit_bins(data: CalibrationData, *, method: str, fit: FitBins) -> StepCurve:
    """Fit a netcal calibrator on σ(Δ/T) and tabulate it.

    Parameters
    ----------
    data : CalibrationData
        The bins cut σ(Δ/T) with the data's T, not Δ.
    method : str
        The calibrator's name, for messages.
    fit : callable
        Probabilities and 0/1 labels to the fitted netcal object and the numbers of equal-width
        bins that it uses.

    Returns
    -------
    StepCurve

    Raises
    ------
    OptionError
        If the weights and votes are not small whole multiples of one another.
    """
    # netcal takes no weights, so rows are copied in proportion to them.
    rows, labels = _copy_rows(data, method)
    # Each judgment in both orientations, so that the map is odd about ½.
    both = np.concatenate([data.margins[rows], -data.margins[rows]])
    p = np.asarray(expit(both / data.temperature), dtype=np.float64)
    fitted, bins = fit(p, np.concatenate([labels, 1 - labels]))
    # The bounds of all bins above ½; in between the fitted map is constant.
    bounds = np.unique(np.concatenate([np.linspace(0.0, 1.0, n + 1) for n in bins]))
    bounds = np.concatenate([[0.5], bounds[(bounds > 0.5 + 1e-12) & (bounds < 1 - 1e-12)], [1.0]])
    # Tabulated at the middle: at a bound two bins meet.
    middles = 0.5 * (bounds[:-1] + bounds[1:])
    # Both orientations leave asymmetry only in rounding and at ties, which the mean removes.
    values = 0.5 * (fitted.transform(middles) + 1 - fitted.transform(1 - middles))
    edges = data.temperature * np.asarray(logit(bounds[1:-1]), dtype=np.float64)
    # Neighbouring bins of one value are one step.
    differs = np.diff(values) != 0
    first = np.concatenate([[True], differs])
    return StepCurve(tuple(edges[differs].tolist()), tuple(values[first].clip(0, 1).tolist()))


def _copy_rows(data: CalibrationData, method: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and labels, each row copied in proportion to its weight for either side."""
    y, w = data.targets, data.weights
    # The judgment's mass for the first side, then for the second, shape (2·n,).
    mass = np.concatenate([w * y, w * (1 - y)])
    unit = float(mass[mass > 0].min())
    # Small fractions only: an irrational ratio of weights has no whole-number copies.
    parts = [Fraction(value).limit_denominator(1000) for value in np.unique(mass / unit)]
    common = math.lcm(*(part.denominator for part in parts))
    counts = np.rint(mass / unit * common)
    if counts.sum() > _MAX_ROWS or not np.allclose(counts, mass / unit * common, rtol=0, atol=1e-6):
        raise OptionError(
            f"method {method!r} counts judgments, and these weights or votes are not small whole "
            f"multiples of one another ({len(parts)} different shares); round them, or use "
            "method='isotonic'"
        )
    copies = np.repeat(np.arange(len(mass)), counts.astype(np.int64))
    return copies % len(y), (copies < len(y)).astype(np.int64)
