"""Temperature scaling: p = σ(Δ/T), with an interval that is robust to clusters of pairs.

The fit is convex in 1/T: Newton's method in float64 with a bracket.

References
----------
.. [1] Guo et al. 2017, arXiv 1706.04599: temperature scaling.
.. [2] Rahaman & Thiery 2020, arXiv 2007.08792: pool, then calibrate.
.. [3] Liang & Zeger 1986: the cluster-robust (sandwich) variance.
.. [4] Cameron, Gelbach & Miller 2011: clusters in two ways at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import expit
from scipy.stats import t as student

from ensemble_rm.aggregation.aggregator import score_matrix
from ensemble_rm.arrays import Floats, mean_of_present
from ensemble_rm.calibration.calibrator import Calibrator
from ensemble_rm.calibration.limits import MIN_JUDGMENTS
from ensemble_rm.errors import (
    NonFiniteScoreError,
    NoPositiveTemperatureError,
    OptionError,
    SeparableError,
    TooFewJudgmentsError,
)

# Every calibration has a temperature; this method has nothing else.
CALIBRATOR = Calibrator("temperature", strict=True)


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature.

    Attributes
    ----------
    temperature : float
        T > 0, a divisor, in the unit of the margins.
    low, high : float
        Bounds of its confidence interval.
    log_se : float
        Standard error of log T, robust to clusters.
    nll : float
        NLL of the fitted judgments, in nats per judgment.
    judgments, prompts : int
        Number of judgments in the fit, and of their prompts.
    """

    temperature: float
    low: float
    high: float
    log_se: float
    nll: float
    judgments: int
    prompts: int

    def __post_init__(self) -> None:
        # A temperature ≤ 0 would turn probabilities round, and NaN would pass every comparison.
        if not 0 < self.temperature < math.inf:
            raise OptionError(f"temperature must be finite and > 0, not {self.temperature!r}")
        if not 0 <= self.low <= self.temperature <= self.high:
            raise OptionError(
                f"low and high must bound the temperature {self.temperature!r}, not be "
                f"{self.low!r} and {self.high!r}"
            )
        if not (self.log_se >= 0 and self.nll >= 0):
            raise OptionError(f"log_se and nll must be ≥ 0, not {self.log_se!r} and {self.nll!r}")
        if min(self.judgments, self.prompts) < 1:
            raise OptionError(
                f"a fit has judgments and prompts, not {self.judgments} and {self.prompts}"
            )


def _vector(values: ArrayLike | None, n: int, default: float) -> Floats:
    if values is None:
        return np.full(n, default)
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (n,):
        raise OptionError(f"expected {n} values, not an array of shape {vector.shape}")
    return vector


def margin_losses(margins: Floats, targets: Floats) -> Floats:
    """Return −y log σ(Δ) − (1 − y) log σ(−Δ) of each judgment, exact at any margin."""
    return np.asarray(np.logaddexp(0.0, -margins) + (1 - targets) * margins, dtype=np.float64)


def margin_nll(margins: Floats, targets: Floats, weights: Floats, inverse: float) -> float:
    """Weighted mean of −y log σ(βΔ) − (1 − y) log σ(−βΔ)."""
    loss = margin_losses(inverse * margins, targets)
    return float((weights * loss).sum() / weights.sum())


def fit_temperature(
    margins: ArrayLike,
    targets: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    annotators: ArrayLike | None = None,
    min_judgments: int = MIN_JUDGMENTS,
    level: float = 0.95,
) -> TemperatureFit:
    """Fit T on the NLL of judgments [1]_, with a sandwich interval over prompts [3]_.

    Parameters
    ----------
    margins : array_like, shape (n_pairs,)
        Aggregated reward of the first minus that of the second [2]_.
    targets : array_like, shape (n_pairs,)
        P(first is preferred), in [0, 1].
    weights : array_like, shape (n_pairs,), optional
        Weight of each judgment, > 0.
    groups : array_like of int, shape (n_pairs,), optional
        Prompt of each pair (default: all differ).
    annotators : array_like of int, shape (n_pairs,), optional
        Annotator of each judgment, for an interval over prompts and annotators [4]_; not used where
        some are unknown (−1), or all are the same.
    min_judgments : int
        Minimum number of judgments with a margin other than 0.
    level : float
        Nominal coverage of the interval.

    Returns
    -------
    TemperatureFit
        The same for either orientation of the pairs.

    Raises
    ------
    TooFewJudgmentsError
        If fewer than `min_judgments` judgments have a margin other than 0.
    SeparableError
        If every judgment agrees with its margin.
    NoPositiveTemperatureError
        If the margins contradict the judgments.
    """
    x, y, w = read_judgments(margins, targets, weights, min_judgments=min_judgments)
    scale = float(np.sqrt(np.mean(x**2)))
    # At RMS 1 the search starts at a temperature of the right order, in any units.
    x = x / scale
    require_pull(x, y, w)
    # One judgment against its margin is enough to keep T above 0.
    if not ((x > 0) & (y < 1) | (x < 0) & (y > 0)).any():
        raise SeparableError(
            f"all {int((x != 0).sum())} judgments agree with their margins, so the likelihood "
            "pulls T to 0; use more judgments, or ones that the members were not trained on"
        )
    beta = fit_inverse(x, y, w)
    p = np.asarray(expit(beta * x))
    # Derivative of the log-likelihood by β, one per judgment.
    score = w * (y - p) * x
    curvature = float((w * p * (1 - p) * x**2).sum())
    meat, prompts, count = clustered_meat(score, groups, annotators)
    # Delta method: se(log T) = se(β)/β.
    log_se = math.sqrt(meat) / curvature / beta
    # Student's t of G − 1, since the number of clusters, not of judgments, is what is small.
    reach = float(student.ppf(0.5 + level / 2, max(count - 1, 1))) * log_se
    temperature = scale / beta
    return TemperatureFit(
        temperature,
        temperature * math.exp(-reach),
        # exp(700) is the largest that float64 holds.
        temperature * math.exp(min(reach, 700.0)),
        log_se,
        margin_nll(x, y, w, beta),
        len(x),
        prompts,
    )


def clustered_meat(
    score: Floats, groups: ArrayLike | None, annotators: ArrayLike | None
) -> tuple[float, int, int]:
    """Return the variance of a sum of scores, the number of prompts, and the smaller number.

    Over prompts and annotators it is the sum of both variances, less that over their intersections
    [4]_; never less than over prompts alone, which the difference can be by chance.

    Parameters
    ----------
    score : ndarray, shape (n_judgments,)
    groups, annotators : array_like of int, shape (n_judgments,), optional
        See `fit_temperature`.

    Returns
    -------
    variance : float
    prompts : int
    clusters : int
        Number of prompts or of annotators, whichever is smaller.
    """
    prompts = np.arange(len(score)) if groups is None else np.asarray(groups)
    by_prompt = score if groups is None else add_up(score, groups)
    meat = _meat(by_prompt)
    if annotators is None:
        return meat, len(by_prompt), len(by_prompt)
    codes = np.asarray(annotators)
    by_annotator = add_up(score, codes)
    # One annotator says nothing about the variance between annotators.
    if len(by_annotator) < 2 or (codes < 0).any():
        return meat, len(by_prompt), len(by_prompt)
    first = np.unique(prompts, return_inverse=True)[1]
    both = add_up(score, first * (int(codes.max()) + 1) + codes)
    two_way = meat + _meat(by_annotator) - _meat(both)
    return max(meat, two_way), len(by_prompt), min(len(by_prompt), len(by_annotator))


def _meat(clusters: Floats) -> float:
    # G/(G − 1) corrects the variance for a small number of clusters.
    return float((clusters**2).sum()) * len(clusters) / max(len(clusters) - 1, 1)


def read_judgments(
    margins: ArrayLike, targets: ArrayLike, weights: ArrayLike | None, *, min_judgments: int
) -> tuple[Floats, Floats, Floats]:
    """Check margins, targets and weights, as every fit does; return them as vectors."""
    x = np.asarray(margins, dtype=np.float64)
    if x.ndim != 1:
        raise OptionError(f"margins must be a vector, not an array of shape {x.shape}")
    y = _vector(targets, len(x), 0.5)
    w = _vector(weights, len(x), 1.0)
    if not (np.isfinite(x).all() and np.isfinite(w).all()):
        raise NonFiniteScoreError("some margins or weights are NaN or infinite")
    if not ((y >= 0) & (y <= 1)).all() or not (w > 0).all():
        raise OptionError("targets must lie in [0, 1] and weights must be > 0")
    informative = int((x != 0).sum())
    # A margin of 0 says nothing about T.
    if informative < max(min_judgments, 2):
        raise TooFewJudgmentsError(
            f"{informative} judgments have a margin other than 0; a temperature needs at least "
            f"{max(min_judgments, 2)}"
        )
    return x, y, w


def require_pull(x: Floats, y: Floats, w: Floats) -> None:
    """Refuse judgments that contradict their margins."""
    pull = float((w * (2 * y - 1) * x).sum())
    if pull <= 0:
        raise NoPositiveTemperatureError(
            f"the judgments contradict the margins (Σ(2y − 1)Δ = {pull:.4g} ≤ 0): "
            "no positive temperature fits; check the pairs' orientation or retrain the members"
        )


def add_up(score: Floats, groups: ArrayLike) -> Floats:
    """Return the sum of each group's scores, shape (n_groups,)."""
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    if labels.shape != score.shape:
        raise OptionError(f"{labels.size} groups for {len(score)} pairs")
    return np.asarray(np.bincount(labels, score), dtype=np.float64)


_SAMPLE = 4096  # judgments in the first stage of a large fit


def fit_inverse(x: Floats, y: Floats, w: Floats, start: float = 1.0) -> float:
    """Minimise the NLL over β = 1/T > 0, by Newton's method inside a shrinking bracket.

    The margins must have about unit size, agree with the verdicts in sum, and not be separable. A
    large fit starts from the optimum of a subsample, which saves steps on all judgments and leads
    to the same optimum.
    """
    if len(x) > 4 * _SAMPLE:
        # A regular slice, not the first rows: stores are in order of time.
        part = slice(None, None, len(x) // _SAMPLE)
        small = (x[part], y[part], w[part])
        against = (small[0] > 0) & (small[1] < 1) | (small[0] < 0) & (small[1] > 0)
        if against.any() and (small[2] * (2 * small[1] - 1) * small[0]).sum() > 0:
            # A good start saves Newton steps on all judgments; the result does not depend on it.
            start = fit_inverse(*small)
    wx = w * x
    wxx, constant = wx * x, float(wx @ y)
    low, high, beta = 0.0, math.inf, start
    for _ in range(200):
        p = np.asarray(expit(beta * x))
        gradient = float(wx @ p) - constant
        curvature = float(wxx @ (p * (1 - p)))
        low, high = (beta, high) if gradient < 0 else (low, beta)
        step = beta - gradient / curvature if curvature > 0 else math.inf
        # While there is no upper end, doubling finds one.
        middle = 2 * beta if high == math.inf else 0.5 * (low + high)
        # A Newton step outside the bracket, or a huge one, is replaced by a bisection.
        new = step if low <= step <= min(high, 10 * beta) else middle
        # Newton converges quadratically: the next step's error is about the square of this one's.
        if abs(new - beta) <= 1e-6 * beta:
            return new
        beta = new
        # Separable as far as float64 can tell.
        if beta > 1e12:
            raise SeparableError("the likelihood pulls T to 0; use more judgments")
    return beta


def mixture_probability(member_margins: ArrayLike, temperature: float) -> Floats:
    """Return p̄ = mean of σ(Δᵢ/T) over the members whose margin is not NaN, shape (n_pairs,).

    NaN where there is none.
    """
    return mean_of_present(expit(score_matrix(member_margins) / temperature))


def fit_mixture_temperature(
    member_margins: ArrayLike, targets: ArrayLike, *, weights: ArrayLike | None = None
) -> float:
    """Fit T_mix on the NLL of the mixture p̄; it differs from the T of the aggregated margin.

    The likelihood of a mixture need not be convex, so log T is searched on a grid, then refined.

    Parameters
    ----------
    member_margins : array_like, shape (n_pairs, n_members)
        Normalised; NaN where a member did not score both sides, which leaves it out of the mixture.
        A pair without any margin is left out of the fit.
    targets : array_like, shape (n_pairs,)
        P(first is preferred), in [0, 1].
    weights : array_like, shape (n_pairs,), optional
        Weight of each judgment, > 0.

    Returns
    -------
    float
        T_mix > 0, in the unit of the margins.

    Raises
    ------
    NonFiniteScoreError
        If a margin is infinite.
    NoPositiveTemperatureError
        If every margin is 0 or NaN.
    """
    all_margins = score_matrix(member_margins)
    if np.isinf(all_margins).any():
        raise NonFiniteScoreError("some margins of the members are infinite")
    # Pairs that no member scored.
    known = ~np.isnan(all_margins).all(axis=1)
    matrix = all_margins[known]
    y = _vector(targets, len(all_margins), 0.5)[known]
    w = _vector(weights, len(all_margins), 1.0)[known]
    scale = float(np.sqrt(np.nanmean(matrix**2))) if len(matrix) else 0.0
    if not scale > 0:
        raise NoPositiveTemperatureError("every margin is 0 or missing, so no temperature fits")

    def loss(log_t: float) -> float:
        # log 0 of a saturated mixture would make the whole loss infinite.
        p = np.clip(mixture_probability(matrix, scale * math.exp(log_t)), 1e-300, 1 - 1e-16)
        return float(-(w * (y * np.log(p) + (1 - y) * np.log1p(-p))).sum() / w.sum())

    # T from e⁻⁴ to e⁶ of the margins' RMS; the mixture's loss may have two minima.
    grid = np.linspace(-4, 6, 41)
    best = int(np.argmin([loss(float(g)) for g in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    result = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    return scale * math.exp(float(result.x))


def pooling_gain(member_margins: ArrayLike, pooled: ArrayLike, targets: ArrayLike) -> float:
    """Return the pooling gain in nats: mean member NLL − pooled NLL, each at its own T."""
    matrix = score_matrix(member_margins)
    own = [fit_temperature(matrix[:, i], targets).nll for i in range(matrix.shape[1])]
    return float(np.mean(own)) - fit_temperature(pooled, targets).nll
