"""Whether the two newest parts of the judgments tell the same: one bad batch is not followed.

A month of corrupted judgments and a true, sudden change look alike while they are the newest; the
gate, which looks at that month, may prefer whatever leans its way, and the refit would take the
month in. What tells them apart is the next batch. So the newest part and the one before it, equally
many judgments, must agree: both slopes 1/T are compared by one step of Newton's method from their
common fit, with a variance over prompts (a score test [1]_, made robust [2]_). Slopes and not
temperatures: they stay finite, and may be negative, where labels are noise or inverted.

References
----------
.. [1] Rao 1948: the score test.
.. [2] Liang & Zeger 1986: the cluster-robust variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from ensemble_rm.calibration.temperature import fit_temperature
from ensemble_rm.errors import CalibrationError
from ensemble_rm.recalibration.judged import DatedMargins, Ints

LEVEL = 0.99


@dataclass(frozen=True, slots=True)
class Confirmation:
    """How far the two newest parts agree.

    Attributes
    ----------
    agrees : bool
        Whether chance explains how they differ.
    reason : str
        In words.
    z : float
        Newest minus previous slope 1/T, in standard errors; NaN where it cannot be said.
    newest, previous : float
        Slopes 1/T of the two parts; NaN where they cannot be said.
    level : float
        At which |z| is called more than chance.
    """

    agrees: bool
    reason: str
    z: float
    newest: float
    previous: float
    level: float


def compare_newest(
    data: DatedMargins, fit: Ints, gate: Ints, *, level: float = LEVEL
) -> Confirmation:
    """Compare the gate part with as many judgments just before it.

    Parameters
    ----------
    data : DatedMargins
    fit, gate : ndarray of int
        Rows of the two parts, as `split_by_time` gives them.
    level : float
        Two-sided.

    Returns
    -------
    Confirmation
    """
    previous = fit[np.argsort(data.times[fit], kind="stable")][-len(gate) :]
    both = data.take(np.concatenate([previous, gate]))
    try:
        common = fit_temperature(
            both.margins, both.targets, weights=both.weights, groups=both.groups, min_judgments=2
        )
    except CalibrationError as error:
        nan = math.nan
        return Confirmation(
            agrees=False, reason=str(error), z=nan, newest=nan, previous=nan, level=level
        )
    beta = 1.0 / common.temperature
    new, new_variance = _step(data.take(gate), beta)
    old, old_variance = _step(data.take(previous), beta)
    spread = math.sqrt(new_variance + old_variance)
    z = (new - old) / spread if spread > 0 else 0.0
    limit = float(norm.ppf(0.5 + level / 2))
    agrees = abs(z) <= limit
    reason = (
        f"the newest judgments have a slope 1/T of {new:.3f}, those before them {old:.3f} "
        f"(z = {z:.1f}): "
        + ("chance explains it" if agrees else "a change that the next batch has to confirm")
    )
    return Confirmation(agrees, reason, z, new, old, level)


def _step(part: DatedMargins, beta: float) -> tuple[float, float]:
    """Return a part's slope by one step from `beta`, and its variance over prompts."""
    p = np.asarray(expit(beta * part.margins))
    score = part.weights * (part.targets - p) * part.margins
    curvature = float((part.weights * p * (1 - p) * part.margins**2).sum())
    if not curvature > 0:
        return beta, math.inf
    labels = np.unique(part.groups, return_inverse=True)[1]
    sums = np.bincount(labels, score)
    slope = beta + float(score.sum()) / curvature
    return slope, float(((sums - sums.mean()) ** 2).sum()) / curvature**2
