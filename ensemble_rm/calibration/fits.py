"""Fits of the curves beside the temperature; each takes what `fit_temperature` has accepted.

Isotonic regression and the binning calibrators see every judgment in both orientations, (Δ, y) and
(−Δ, 1 − y); what is left of asymmetry is averaged away.

References
----------
.. [1] Zadrozny & Elkan 2002: isotonic regression.
.. [2] Zadrozny & Elkan 2001: histogram binning.
.. [3] Naeini et al. 2015: Bayesian binning into quantiles (BBQ), netcal's with equal widths.
"""

from __future__ import annotations

import contextlib
import io
import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.curves import AnyCurve, LinearCurve, PowerCurve, StepCurve
from ensemble_rm.calibration.temperature import fit_inverse, margin_nll
from ensemble_rm.errors import NoPositiveTemperatureError, OptionError, SeparableError

METHODS: tuple[str, ...] = ("temperature", "power", "isotonic", "histogram", "bbq")
"""Every calibrator's name; the first three never fall with a rising margin."""

BINS = 10  # of a histogram, on the probabilities of the temperature
_GAMMAS = (0.05, 20.0)  # beyond these a power is refused
_ROWS = 2_000_000  # the most that a judgment's shares may be copied to


def fit_curve(
    method: str, margins: Floats, targets: Floats, weights: Floats, *, temperature: float
) -> AnyCurve | None:
    """Fit a method's curve; None for the temperature, which is its own.

    Parameters
    ----------
    method : str
        One of `METHODS`.
    margins, targets, weights : ndarray, shape (n_pairs,)
        As `fit_temperature` takes them.
    temperature : float
        T of these judgments: binning calibrators cut σ(Δ/T), not Δ.

    Returns
    -------
    PowerCurve, LinearCurve or StepCurve, optional

    Raises
    ------
    OptionError
        If the method is unknown, or cannot take these weights and votes.
    SeparableError, NoPositiveTemperatureError
        If no power fits.
    """
    if method not in METHODS:
        raise OptionError(f"no calibration method {method!r}; there are {', '.join(METHODS)}")
    if method == "temperature":
        return None
    # A margin of 0 is ½ under every odd curve.
    told = margins != 0
    x, y, w = margins[told], targets[told], weights[told]
    if method == "power":
        return fit_power(x, y, w)
    if method == "isotonic":
        return fit_isotonic(x, y, w)
    return fit_bins(x, y, w, method=method, temperature=temperature)


def fit_power(x: Floats, y: Floats, w: Floats) -> PowerCurve:
    """Fit a and γ on the weighted NLL: for each γ the fit of a is convex; γ by a refined grid."""
    scale = float(np.sqrt(np.mean(x**2)))
    sides, log_sizes = np.sign(x), np.log(np.abs(x) / scale)

    def raised(log_gamma: float) -> Floats:
        sizes: Floats = np.exp(np.clip(math.exp(log_gamma) * log_sizes, -300, 300))
        return sides * sizes

    def loss(log_gamma: float) -> float:
        powers = raised(log_gamma)
        return margin_nll(powers, y, w, _inverse(powers, y, w))

    grid = np.log(np.geomspace(*_GAMMAS, 31))
    losses = [loss(float(g)) for g in grid]
    best = int(np.argmin(losses))
    if best == 0:
        raise NoPositiveTemperatureError(
            "the verdicts do not depend on the margins' size, which pulls γ to 0; "
            "use method='temperature', or more judgments"
        )
    if best == len(grid) - 1:
        raise SeparableError(
            "only the largest margins tell anything, which pulls γ to infinity; "
            "use method='temperature', or more judgments"
        )
    bounds = (grid[best - 1], grid[best + 1])
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    # γ = 1 is among the candidates, so that no temperature fits better.
    log_gamma = min((float(found.x), 0.0), key=loss)
    beta, gamma = _inverse(raised(log_gamma), y, w), math.exp(log_gamma)
    return PowerCurve(math.exp(math.log(beta) - gamma * math.log(scale)), gamma)


def _inverse(powers: Floats, y: Floats, w: Floats) -> float:
    """Return the best a ≥ 0 of margins that need not point the right way."""
    unit = float(np.sqrt(np.mean(powers**2)))
    if float((w * (2 * y - 1) * powers).sum()) <= 0:
        return 0.0
    return fit_inverse(powers / unit, y, w) / unit


def _both(x: Floats, y: Floats, w: Floats) -> tuple[Floats, Floats, Floats]:
    return np.concatenate([x, -x]), np.concatenate([y, 1 - y]), np.concatenate([w, w])


def fit_isotonic(x: Floats, y: Floats, w: Floats) -> LinearCurve:
    """Fit scikit-learn's isotonic regression on both orientations [1]_."""
    from sklearn.isotonic import IsotonicRegression

    both, targets, weights = _both(x, y, w)
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    fitted.fit(both, targets, sample_weight=weights)
    knots = np.unique(np.abs(fitted.X_thresholds_))
    values = 0.5 * (fitted.predict(knots) + 1 - fitted.predict(-knots))
    rising = np.clip(np.maximum.accumulate(values), 0.5, 1.0)
    return LinearCurve(tuple(knots.tolist()), tuple(rising.tolist()))


def fit_bins(x: Floats, y: Floats, w: Floats, *, method: str, temperature: float) -> StepCurve:
    """Fit netcal's histogram [2]_ or BBQ [3]_ on σ(Δ/T), and tabulate it exactly.

    netcal knows no votes, ties or weights: a judgment is copied in their proportion. BBQ takes the
    copies and both orientations for judgments of their own when it weighs its numbers of bins.
    """
    from netcal.binning import BBQ, HistogramBinning

    rows, labels = _copied(x, y, w, method)
    both = np.concatenate([x[rows], -x[rows]])
    sure = np.asarray(expit(both / temperature), dtype=np.float64)
    verdicts = np.concatenate([labels, 1 - labels])
    if method == "histogram":
        fitted, counts = HistogramBinning(bins=BINS).fit(sure, verdicts), {BINS}
    else:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            fitted = BBQ().fit(sure, verdicts)
        counts = {part["bins"] for part in fitted.get_params(deep=True)["_binning_models"]}
    bounds = np.unique(np.concatenate([np.linspace(0.0, 1.0, n + 1) for n in counts]))
    bounds = np.concatenate([[0.5], bounds[(bounds > 0.5 + 1e-12) & (bounds < 1 - 1e-12)], [1.0]])
    middles = 0.5 * (bounds[:-1] + bounds[1:])
    values = 0.5 * (fitted.transform(middles) + 1 - fitted.transform(1 - middles))
    edges = temperature * np.asarray(logit(bounds[1:-1]), dtype=np.float64)
    new = np.diff(values) != 0
    kept = np.concatenate([[True], new])
    return StepCurve(tuple(edges[new].tolist()), tuple(values[kept].clip(0, 1).tolist()))


def _copied(
    x: Floats, y: Floats, w: Floats, method: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and labels, each row copied in proportion to its weight for either side."""
    mass = np.concatenate([w * y, w * (1 - y)])
    unit = float(mass[mass > 0].min())
    parts = [Fraction(value).limit_denominator(1000) for value in np.unique(mass / unit)]
    common = math.lcm(*(part.denominator for part in parts))
    counts = np.rint(mass / unit * common)
    if counts.sum() > _ROWS or not np.allclose(counts, mass / unit * common, rtol=0, atol=1e-6):
        raise OptionError(
            f"method {method!r} counts judgments, and these weights or votes are no small whole "
            f"multiples of one another ({len(parts)} different shares); round them, or use "
            "method='isotonic', which takes them as they are"
        )
    places = np.repeat(np.arange(len(mass)), counts.astype(np.int64))
    return places % len(x), (places < len(x)).astype(np.int64)
