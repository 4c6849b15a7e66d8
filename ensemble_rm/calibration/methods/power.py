"""Power calibration: logit p = a·sign(Δ)·|Δ|^γ, one parameter more than a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibrator import CalibrationData, Calibrator, Curve
from ensemble_rm.calibration.methods.temperature import fit_inverse, margin_nll
from ensemble_rm.errors import NoPositiveTemperatureError, OptionError, SeparableError

_LARGEST = 1e12  # a, for margins of RMS 1
_GAMMAS = (0.05, 20.0)  # a γ at either end is refused


@dataclass(frozen=True)
class PowerCurve(Curve):
    """Logit p = a·sign(Δ)·|Δ|^γ: strictly rising; γ = 1 is the temperature 1/a.

    Attributes
    ----------
    a : float
        > 0.
    gamma : float
        γ > 0. Below 1, large margins say less than under a temperature; above 1, more.
    """

    a: float
    gamma: float

    shape: ClassVar[str] = "power"

    def __post_init__(self) -> None:
        if not (0 < self.a < np.inf and 0 < self.gamma < np.inf):
            raise OptionError(f"a and gamma must be finite and > 0, not {self.a} and {self.gamma}")

    def above(self, sizes: Floats) -> Floats:
        """Return σ(a·|Δ|^γ)."""
        with np.errstate(over="ignore"):
            return np.asarray(expit(self.a * sizes**self.gamma))


def fit_power(data: CalibrationData) -> PowerCurve:
    """Fit a and γ on the weighted NLL.

    For each γ the fit of a is convex; γ is found on a grid of log γ, then refined.

    Parameters
    ----------
    data : CalibrationData

    Returns
    -------
    PowerCurve

    Raises
    ------
    NoPositiveTemperatureError
        If the verdicts do not depend on the size of the margins (γ → 0).
    SeparableError
        If only the largest margins agree with the verdicts (γ → ∞).
    """
    x, y, w = data.margins, data.targets, data.weights
    # Scaled to RMS 1: powers of raw margins overflow or underflow at large γ.
    scale = float(np.sqrt(np.mean(x**2)))
    signs, log_sizes = np.sign(x), np.log(np.abs(x) / scale)

    def powers_of(log_gamma: float) -> Floats:
        # ±300 keeps exp inside float64.
        sizes: Floats = np.exp(np.clip(math.exp(log_gamma) * log_sizes, -300, 300))
        return signs * sizes

    def loss(log_gamma: float) -> float:
        powers = powers_of(log_gamma)
        return margin_nll(powers, y, w, _fit_a(powers, y, w))

    # The loss in γ may have several minima; the grid finds the bracket of the lowest.
    grid = np.log(np.geomspace(*_GAMMAS, 31))
    losses = [loss(float(g)) for g in grid]
    best = int(np.argmin(losses))
    if best == 0:
        raise NoPositiveTemperatureError(
            "the verdicts do not depend on the size of the margins, which pulls γ to 0; "
            "use method='temperature', or more judgments"
        )
    if best == len(grid) - 1:
        raise SeparableError(
            "only the largest margins agree with the verdicts, which pulls γ to infinity; "
            "use method='temperature', or more judgments"
        )
    bounds = (grid[best - 1], grid[best + 1])
    result = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    # γ = 1 is among the candidates, so that no temperature fits better.
    log_gamma = min((float(result.x), 0.0), key=loss)
    a, gamma = _fit_a(powers_of(log_gamma), y, w), math.exp(log_gamma)
    # Back to the margins' own units.
    return PowerCurve(math.exp(math.log(a) - gamma * math.log(scale)), gamma)


def _fit_a(powers: Floats, y: Floats, w: Floats) -> float:
    """Return the best a ≥ 0; 0 where these powers of the margins contradict the verdicts."""
    unit = float(np.sqrt(np.mean(powers**2)))
    # No pull towards the first side: the best a would be negative.
    if float((w * (2 * y - 1) * powers).sum()) <= 0:
        return 0.0
    scaled = powers / unit
    try:
        return fit_inverse(scaled, y, w) / unit
    except SeparableError:
        # At a large γ all but a few margins have powers near 0, so that the best a is huge. It is
        # bounded here, for the other γ to be compared with.
        found = minimize_scalar(
            lambda log_a: margin_nll(scaled, y, w, math.exp(log_a)),
            bounds=(0.0, math.log(_LARGEST)),
            method="bounded",
            options={"xatol": 1e-9},
        )
        return math.exp(float(found.x)) / unit


CALIBRATOR = Calibrator("power", PowerCurve, fit_power, strict=True)
