"""Isotonic calibration: scikit-learn's isotonic regression, made odd about ½.

References
----------
.. [1] Zadrozny & Elkan 2002: transforming classifier scores into accurate probability estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibrator import CalibrationData, Calibrator, Curve
from ensemble_rm.errors import OptionError


@dataclass(frozen=True)
class LinearCurve(Curve):
    """Straight lines between knots, constant beyond the last.

    Attributes
    ----------
    knots : tuple of float
        Rising margins > 0; the curve starts in (0, ½).
    values : tuple of float
        Probability at each knot.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    shape: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        if len(self.knots) != len(self.values):
            raise OptionError(f"{len(self.values)} probabilities for {len(self.knots)} knots")
        check_points(self.shape, self.knots, self.values)

    def above(self, sizes: Floats) -> Floats:
        """Return the interpolated probability."""
        return np.interp(sizes, (0.0, *self.knots), (0.5, *self.values))


def check_points(shape: str, margins: tuple[float, ...], values: tuple[float, ...]) -> None:
    """Check that margins rise from above 0 and that values are probabilities.

    Raises
    ------
    OptionError
        If they do not, or are not.
    """
    points, heights = np.array((0.0, *margins)), np.array(values)
    if not np.isfinite(points).all() or not (np.diff(points) > 0).all():
        raise OptionError(f"a {shape} curve needs rising margins above 0, not {margins}")
    if not ((heights >= 0) & (heights <= 1)).all():
        raise OptionError(f"a {shape} curve needs probabilities in [0, 1], not {values}")


def fit_isotonic(data: CalibrationData) -> LinearCurve:
    """Fit isotonic regression [1]_ on every judgment in both orientations.

    Parameters
    ----------
    data : CalibrationData

    Returns
    -------
    LinearCurve
    """
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    fitted.fit(
        np.concatenate([data.margins, -data.margins]),
        np.concatenate([data.targets, 1 - data.targets]),
        sample_weight=np.tile(data.weights, 2),
    )
    knots = np.unique(np.abs(fitted.X_thresholds_))
    # Both orientations leave asymmetry only in rounding and at ties, which the mean removes.
    values = 0.5 * (fitted.predict(knots) + 1 - fitted.predict(-knots))
    # Averaging both orientations can break the order by rounding; accumulate restores it.
    rising = np.clip(np.maximum.accumulate(values), 0.5, 1.0)
    return LinearCurve(tuple(knots.tolist()), tuple(rising.tolist()))


CALIBRATOR = Calibrator("isotonic", LinearCurve, fit_isotonic)
