"""Which parts of the judgments tell the same: one bad batch is not followed, nor a past regime.

A month of corrupted judgments and a true, sudden change look alike while they are the newest; the
gate, which looks at that month, may prefer whatever leans its way, and the refit would take the
month in. What tells them apart is the next batch. So the newest part and the one before it, equally
many judgments, must agree: both slopes 1/T are compared by one step of Newton's method from their
common fit, with a variance over prompts (a score test [1]_, made robust [2]_). Slopes and not
temperatures: they stay finite, and may be negative, where labels are noise or inverted.

Once they agree, older parts of the same length that contradict the one before the newest are left
out: what was judged before a change, and what was corrupted, belong to no fit of today. The newest
part has no say in that, so that the gate stays a test on judgments that nothing was chosen by.

References
----------
.. [1] Rao 1948: the score test.
.. [2] Liang & Zeger 1986: the cluster-robust variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

from ensemble_rm.errors import CalibrationError
from ensemble_rm.evidence.dated_margins import DatedMargins, Ints, joined
from ensemble_rm.recalibration.slope import fit_signed

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
    previous = _by_time(data, fit)[-len(gate) :]
    return _compare(data.take(gate), data.take(previous), level)


def changed_since(
    data: DatedMargins, fit: Ints, size: int, *, level: float = LEVEL
) -> NDArray[np.bool_]:
    """Say which judgments fall into times that contradict the newest ones of the older part.

    Parameters
    ----------
    data : DatedMargins
    fit : ndarray of int
        Rows of the older part.
    size : int
        Of a block, judgments; the oldest block takes the remainder, too.
    level : float
        Two-sided, of each comparison.

    Returns
    -------
    ndarray of bool, shape (n_judgments,)
        Of all rows of `data`; never of the newest block.
    """
    rows = _by_time(data, fit)
    ends = list(range(len(rows), size - 1, -size)) or [len(rows)]
    blocks = [rows[max(end - size, 0) : end] for end in ends]
    blocks[-1] = rows[: ends[-1]]
    newest = data.take(blocks[0])
    changed = np.zeros(len(data), dtype=bool)
    for block in blocks[1:]:
        if not _compare(newest, data.take(block), level).agrees:
            first, last = data.times[block[0]], data.times[block[-1]]
            changed |= (data.times >= first) & (data.times <= last)
    return np.asarray(changed & (data.times < newest.times.min()))


def _by_time(data: DatedMargins, rows: Ints) -> Ints:
    return rows[np.argsort(data.times[rows], kind="stable")]


def _compare(newer: DatedMargins, older: DatedMargins, level: float) -> Confirmation:
    both = joined([older, newer])
    try:
        beta, _ = fit_signed(both)
    except CalibrationError as error:
        nan = math.nan
        return Confirmation(
            agrees=False, reason=str(error), z=nan, newest=nan, previous=nan, level=level
        )
    new, new_variance = _step(newer, beta)
    old, old_variance = _step(older, beta)
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
