"""Which judgments fit a candidate, which gate it, and which are left out.

The newest judgments are the gate's and the older ones fit the candidate, with no prompt on both
sides (`split_by_time`).

A month of corrupted judgments and a true, sudden change look alike as long as they are the newest:
the gate, which sees only that month, may prefer a candidate that follows it. The next batch
distinguishes them. So the newest part and the equally many judgments before it must agree
(`compare_newest`): their slopes 1/T are compared by one Newton step from their common fit, with a
variance over prompts (a score test [1]_, made robust [2]_). Slopes, not temperatures, because they
stay finite where labels are noise and may be negative where labels are inverted.

Once they agree, older blocks of the same size that contradict the newest block of the older part
are left out (`changed_since`): judgments from before a change, and corrupted ones, do not belong in
a fit of today. The gate part is not used for this selection, so that the gate remains an
independent test.

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

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import CalibrationError, OptionError, TooFewJudgmentsError
from ensemble_rm.evidence.dated_margins import DatedMargins, join_margins
from ensemble_rm.evidence.window import Ints
from ensemble_rm.recalibration.fitting import fit_signed

LEVEL = 0.99


@dataclass(frozen=True, eq=False)
class TimeSplit:
    """Rows of the two parts.

    Attributes
    ----------
    fit, gate : ndarray of int
        Rows judged before the cut, and at or after it.
    cut : float
        Start of the newest part, seconds since 1970.
    left_out : int
        Judgments of prompts that were judged on both sides, on the side the prompt was not
        assigned to.
    """

    fit: NDArray[np.int64]
    gate: NDArray[np.int64]
    cut: float
    left_out: int


def split_by_time(groups: Ints, times: Floats, *, share: float) -> TimeSplit:
    """Split judgments at a time, with no prompt on both sides.

    A prompt judged on one side only goes to that side. One judged on both is assigned by a bit of
    its own digest, always the same, and its judgments on the other side are left out. So each part
    still gets half of a fixed set of prompts that is judged again every month.

    Parameters
    ----------
    groups : ndarray of int, shape (n_judgments,)
        Digest of each judgment's prompt.
    times : ndarray, shape (n_judgments,)
        Seconds since 1970.
    share : float
        Smallest share of the judgments in the newest part, in (0, 1). Judgments of the same moment
        stay together.

    Returns
    -------
    TimeSplit

    Raises
    ------
    OptionError
        If `share` is not in (0, 1).
    TooFewJudgmentsError
        If a part would be empty: all judgments have the same time, or there are none.
    """
    if not 0 < share < 1:
        raise OptionError(f"the gate's share must be in (0, 1), not {share}")
    n = len(times)
    if n < 2:
        raise TooFewJudgmentsError(f"{n} judgments cannot be split by time; collect more")
    first_newest = n - max(1, round(share * n))
    cut = float(np.partition(times, first_newest)[first_newest])
    newer = times >= cut
    prompts, labels = np.unique(groups, return_inverse=True)
    judged_newer = np.bincount(labels, newer, len(prompts)) > 0
    judged_older = np.bincount(labels, ~newer, len(prompts)) > 0
    to_gate = judged_newer & (~judged_older | _bit(prompts))
    gate = newer & to_gate[labels]
    fit = ~newer & ~to_gate[labels]
    if not fit.any() or not gate.any():
        raise TooFewJudgmentsError(
            f"{n} judgments leave {int(fit.sum())} to fit on before the cut in time and "
            f"{int(gate.sum())} for the gate after it; collect more, at more times or on more "
            "prompts"
        )
    left_out = n - int(fit.sum() + gate.sum())
    return TimeSplit(np.flatnonzero(fit), np.flatnonzero(gate), cut, left_out)


def _bit(digests: Ints) -> NDArray[np.bool_]:
    """Return a fair bit per digest: the last step of Steele et al.'s (2014) SplitMix64."""
    # Unsigned: the products have to wrap around modulo 2⁶⁴.
    x = digests.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((x >> np.uint64(63)) == 1)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Whether the two newest parts agree.

    Attributes
    ----------
    agrees : bool
        Whether chance explains their difference.
    reason : str
        In words.
    z : float
        Newest minus previous slope 1/T, in standard errors; NaN where it cannot be computed.
    newest, previous : float
        Slopes 1/T of the two parts; NaN where they cannot be computed.
    level : float
        Confidence above which |z| counts as more than chance.
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
        Rows of the two parts, as `split_by_time` returns them.
    level : float
        Confidence, two-sided.

    Returns
    -------
    Confirmation
    """
    previous = _by_time(data, fit)[-len(gate) :]
    return _compare(data.take(gate), data.take(previous), level)


def changed_since(
    data: DatedMargins, fit: Ints, size: int, *, level: float = LEVEL
) -> NDArray[np.bool_]:
    """Mark the judgments of times that contradict the newest block of the older part.

    Parameters
    ----------
    data : DatedMargins
    fit : ndarray of int
        Rows of the older part.
    size : int
        Judgments per block; the oldest block also takes the remainder.
    level : float
        Confidence of each comparison, two-sided.

    Returns
    -------
    ndarray of bool, shape (n_judgments,)
        For all rows of `data`; False throughout the newest block.
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
            # By time and not by row: the gate's prompts of that time are affected, too.
            changed |= (data.times >= first) & (data.times <= last)
    return np.asarray(changed & (data.times < newest.times.min()))


def _by_time(data: DatedMargins, rows: Ints) -> Ints:
    return rows[np.argsort(data.times[rows], kind="stable")]


def _compare(newer: DatedMargins, older: DatedMargins, level: float) -> Confirmation:
    both = join_margins([older, newer])
    try:
        beta, _ = fit_signed(both)
    except CalibrationError as error:
        # Without a common slope the parts cannot be compared, and nothing is confirmed.
        nan = math.nan
        return Confirmation(
            agrees=False, reason=str(error), z=nan, newest=nan, previous=nan, level=level
        )
    new, new_variance = _one_step(newer, beta)
    old, old_variance = _one_step(older, beta)
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


def _one_step(part: DatedMargins, beta: float) -> tuple[float, float]:
    """Return a part's slope by one Newton step from `beta`, and its variance over prompts."""
    p = np.asarray(expit(beta * part.margins))
    score = part.weights * (part.targets - p) * part.margins
    curvature = float((part.weights * p * (1 - p) * part.margins**2).sum())
    if not curvature > 0:
        # No information about the slope: with an infinite variance, z is 0.
        return beta, math.inf
    labels = np.unique(part.groups, return_inverse=True)[1]
    sums = np.bincount(labels, score)
    slope = beta + float(score.sum()) / curvature
    # Centred, because the scores of one part do not sum to 0 at the common slope.
    return slope, float(((sums - sums.mean()) ** 2).sum()) / curvature**2
