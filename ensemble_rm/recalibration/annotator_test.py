r"""Bound what one annotator can do to a window: caps for volume, a test for inversion.

**Caps.** Weights are scaled so that no annotator, and no day of arrival, has more than a given
share c of the window's total weight. With totals W the scaled ones are min(W, λ), where λ is the
one solution of λ = c·Σ min(W, λ). It exists if there are at least 1/c annotators (or days);
with fewer, the cap is off.

**Test.** Annotators differ, so the null hypothesis is a range: an annotator's slope lies between
`LOWEST` and `HIGHEST` times the slope 1/T of all. One who inverts or opposes the reward lies below,
one who always agrees lies above. The statistic S = Σ(y − p)Δ has a known distribution at either end
of the range, whose tail is computed by the saddlepoint approximation [1]_ because judgments may be
few. The annotator with the smallest p-value is rejected if it is at most the level divided by the
number of annotators that are left (Holm [2]_), until none is. The slope of all is fitted with
capped weights, and again after each rejection.

References
----------
.. [1] Lugannani & Rice 1980: saddlepoint approximation of the tail of a sum.
.. [2] Holm 1979: a sequentially rejective multiple test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import CalibrationError, OptionError
from ensemble_rm.evidence.dated_margins import DatedMargins
from ensemble_rm.evidence.window import Ints
from ensemble_rm.recalibration.fitting import fit_signed

LOWEST, HIGHEST = 0.5, 2.0  # tolerated slopes of an annotator, relative to that of all
UNKNOWN = -1  # code of a missing annotator or day


@dataclass(frozen=True, kw_only=True)
class AnnotatorReport:
    """What was capped and who was rejected.

    Attributes
    ----------
    annotators : int
        Number of annotators.
    rejected : tuple of str
        Annotators whose judgments were left out, in order of their p-value.
    p_values : tuple of float
        Of the rejected annotators, before the correction for their number.
    rejected_share : float
        Their share of the capped weight.
    capped : tuple of str
        Annotators whose weight was reduced.
    capped_days : tuple of int
        Days of arrival whose weight was reduced, in days since 1970.
    remarks : tuple of str
        Caps or tests that are off, and why.
    """

    annotators: int
    rejected: tuple[str, ...] = ()
    p_values: tuple[float, ...] = ()
    rejected_share: float = 0.0
    capped: tuple[str, ...] = ()
    capped_days: tuple[int, ...] = ()
    remarks: tuple[str, ...] = ()


def cap_shares(
    weights: Floats, codes: Ints, share: float, *, exempt: bool = False
) -> tuple[Floats, str]:
    """Scale weights so that no code has more than a share of their sum.

    Parameters
    ----------
    weights : ndarray, shape (n_judgments,)
        > 0.
    codes : ndarray of int, shape (n_judgments,)
        Annotator or day of each judgment; `UNKNOWN` where it has none.
    share : float
        In (0, 1]; 1 switches the cap off.
    exempt : bool
        Leave judgments without a code as they are, and cap the others; by default a judgment
        without a code switches the cap off.

    Returns
    -------
    weights : ndarray, shape (n_judgments,)
        Never larger than before.
    remark : str
        Why the cap is off; empty where it is on.

    Raises
    ------
    OptionError
        If `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise OptionError(f"a share must be in (0, 1], not {share}")
    if share == 1 or not len(weights):
        return weights, ""
    coded = codes != UNKNOWN
    if exempt and not coded.all():
        return _cap_coded(weights, codes, coded, share), ""
    if not coded.all():
        return weights, f"{int((codes == UNKNOWN).sum())} judgments have none"
    labels = np.unique(codes, return_inverse=True)[1]
    totals: Floats = np.bincount(labels, weights).astype(np.float64)
    # 1e-9: five equal annotators at a share of a fifth are enough, whatever the rounding.
    if len(totals) * share < 1 - 1e-9:
        return weights, f"{len(totals)} are fewer than 1/{share:g}"
    limit = _limit(totals, share)
    return weights * np.minimum(1.0, limit / totals)[labels], ""


def _cap_coded(weights: Floats, codes: Ints, coded: NDArray[np.bool_], share: float) -> Floats:
    if not coded.any():
        return weights
    labels = np.unique(codes[coded], return_inverse=True)[1]
    totals: Floats = np.bincount(labels, weights[coded]).astype(np.float64)
    free = float(weights[~coded].sum())
    capped = weights.copy()
    capped[coded] *= np.minimum(1.0, _limit(totals, share, free) / totals)[labels]
    return capped


def _limit(totals: Floats, share: float, free: float = 0.0) -> float:
    """Return λ with λ = share·(free + Σ min(total, λ))."""
    ordered = np.sort(totals)[::-1]
    rest = float(ordered.sum()) + free
    for k, total in enumerate(ordered):
        if 1 - k * share <= 1e-9:  # exactly 1/share codes: all get the smallest total
            return float(ordered[-1])
        limit = share * rest / (1 - k * share)
        if total <= limit * (1 + 1e-9):
            return math.inf if k == 0 else limit
        rest -= float(total)
    # Every code is capped, relative to the weight without one.
    left = 1 - len(ordered) * share
    return share * free / left if left > 1e-9 else float(ordered[-1])


def lower_tail(margins: Floats, targets: Floats, slope: float) -> float:
    """Return P(S ≤ observed) for S = Σ(y − p)Δ, where y is Bernoulli with p = σ(slope·Δ).

    Parameters
    ----------
    margins, targets : ndarray, shape (n_judgments,)
    slope : float

    Returns
    -------
    float
        By the saddlepoint approximation; by the normal one near the mean, where that is exact
        enough. 1 without an informative judgment.
    """
    p = np.asarray(expit(slope * margins))
    spread = math.sqrt(float((p * (1 - p) * margins**2).sum()))
    if not spread > 0:
        return 1.0
    # In units of the standard deviation: the root then has about the size of z.
    x = margins / spread
    observed = float(((targets - p) * x).sum())
    least = float(-np.where(x > 0, p * x, -(1 - p) * x).sum())
    if observed <= least * (1 - 1e-9):
        # The most extreme outcome has a known probability.
        return float(math.exp(np.log(np.where(x > 0, 1 - p, p)[x != 0]).sum()))
    if abs(observed) < 0.1:
        return float(norm.cdf(observed))

    def tilted(theta: float) -> Floats:
        return np.asarray(expit(slope * margins + theta * x))

    def excess(theta: float) -> float:
        return float(((tilted(theta) - p) * x).sum()) - observed

    if observed > -least * 1e6 or excess(700.0 / np.abs(x).max()) < 0:
        return 1.0
    low = -700.0 / float(np.abs(x).max())
    if excess(low) > 0:
        return float(math.exp(np.log(np.where(x > 0, 1 - p, p)[x != 0]).sum()))
    theta = float(brentq(excess, low, -low))
    q = tilted(theta)
    # K(θ) = Σ log(1 − p + p·exp(θx)) − θ·Σpx, without overflow.
    logits = slope * margins
    cumulant = float(
        (np.logaddexp(0, logits + theta * x) - np.logaddexp(0, logits) - theta * p * x).sum()
    )
    curvature = float((q * (1 - q) * x**2).sum())
    w = math.copysign(math.sqrt(max(2 * (theta * observed - cumulant), 0.0)), theta)
    u = theta * math.sqrt(curvature)
    if w == 0 or u == 0:
        return float(norm.cdf(observed))
    return float(min(max(norm.cdf(w) + norm.pdf(w) * (1 / w - 1 / u), 0.0), 1.0))


def annotator_p_values(data: DatedMargins, slope: float) -> tuple[Ints, Floats]:
    """Return the annotators, and the smaller p-value of both ends of the tolerated range.

    Parameters
    ----------
    data : DatedMargins
    slope : float
        1/T of all, > 0.

    Returns
    -------
    annotators : ndarray of int, shape (n_annotators,)
        Codes, sorted.
    p_values : ndarray, shape (n_annotators,)
        Twice the smaller one, at most 1.
    """
    codes, labels = np.unique(data.annotators, return_inverse=True)
    order = np.argsort(labels, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    p_values = np.ones(len(codes))
    for i, part in enumerate(rows):
        x, y = data.margins[part], data.targets[part]
        below = lower_tail(x, y, LOWEST * slope)
        # A slope above the range: the same test of the negated margins.
        above = lower_tail(-x, y, -HIGHEST * slope)
        p_values[i] = min(1.0, 2 * min(below, above))
    return codes, p_values


def check_annotators(
    data: DatedMargins, *, share: float, day_share: float, level: float
) -> tuple[NDArray[np.bool_], AnnotatorReport]:
    """Test every annotator of a window against the slope of all.

    Parameters
    ----------
    data : DatedMargins
        With forgetting in its weights.
    share, day_share : float
        Largest share of an annotator and of a day; see `cap_shares`.
    level : float
        Family-wise level of the test; 0 switches it off.

    Returns
    -------
    kept : ndarray of bool, shape (n_judgments,)
        False for judgments of rejected annotators.
    report : AnnotatorReport
    """
    if not 0 <= level < 1:
        raise OptionError(f"the annotators' level must be in [0, 1), not {level}")
    kept = np.ones(len(data), dtype=bool)
    codes = np.unique(data.annotators[data.annotators != UNKNOWN])
    capped = cap_weights(data, share=share, day_share=day_share)
    by_day, _ = cap_shares(data.weights, data.days, day_share, exempt=True)
    days = tuple(int(d) for d in np.unique(data.days[by_day < data.weights * (1 - 1e-9)]))
    reduced = np.unique(data.annotators[capped.weights < by_day * (1 - 1e-9)])
    names = tuple(_name(data, int(code)) for code in reduced if code != UNKNOWN)
    remarks = _remarks(data, share, day_share)
    if len(codes) < 3 or level == 0:
        if level > 0:
            remarks += (f"annotators are not tested: {len(codes)} are fewer than 3",)
        report = AnnotatorReport(
            annotators=len(codes), capped=names, capped_days=days, remarks=remarks
        )
        return kept, report
    rejected: dict[int, float] = {}
    for _ in range(len(codes)):
        rows = np.flatnonzero(kept)
        try:
            part = cap_weights(data.take(rows), share=share, day_share=day_share)
            slope, _fit = fit_signed(part)
        except CalibrationError:
            slope = 0.0
        if slope <= 0:
            remarks += ("annotators are not tested: the judgments contradict the margins",)
            break
        known = data.take(np.flatnonzero(kept & (data.annotators != UNKNOWN)))
        tested, p_values = annotator_p_values(known, slope)
        # One at a time: a large account distorts the slope of all, against which others are tested.
        worst = int(np.argmin(p_values))
        if p_values[worst] > level / len(tested):
            break
        rejected[int(tested[worst])] = float(p_values[worst])
        kept = ~np.isin(data.annotators, list(rejected))
        if not kept.any():
            break
    ordered = sorted(rejected, key=lambda code: (rejected[code], code))
    total = float(capped.weights.sum())
    return kept, AnnotatorReport(
        annotators=len(codes),
        rejected=tuple(_name(data, code) for code in ordered),
        p_values=tuple(rejected[code] for code in ordered),
        rejected_share=float(capped.weights[~kept].sum()) / total,
        capped=names,
        capped_days=days,
        remarks=remarks,
    )


def cap_weights(data: DatedMargins, *, share: float, day_share: float) -> DatedMargins:
    """Return judgments with the weights of annotators and days capped; see `cap_shares`."""
    weights, _ = cap_shares(data.weights, data.days, day_share, exempt=True)
    # Annotators last: theirs is the share that an attack on one account is bounded by.
    weights, _ = cap_shares(weights, data.annotators, share)
    return replace(data, weights=weights)


def _remarks(data: DatedMargins, share: float, day_share: float) -> tuple[str, ...]:
    reasons = {
        "annotators": cap_shares(data.weights, data.annotators, share)[1],
        "days of arrival": cap_shares(data.weights, data.days, day_share, exempt=True)[1],
    }
    return tuple(
        f"the cap on {name} is off: {reason}" for name, reason in reasons.items() if reason
    )


def _name(data: DatedMargins, code: int) -> str:
    names: tuple[Any, ...] = data.annotator_names
    return str(names[code]) if 0 <= code < len(names) else str(code)
