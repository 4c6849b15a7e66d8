"""How good preference probabilities are: NLL, Brier, accuracy, ECE and its null, AUROC, intervals.

`p` is always the probability that the first completion is preferred, `y` the target in [0, 1]
(½ for a tie). No metric depends on which side is called first.

References
----------
.. [1] Naeini et al. 2015: expected calibration error, here on equal-width bins.
.. [2] Błasiok & Nakkiran 2023, arXiv 2309.12236: smooth calibration error.
.. [3] Geifman & El-Yaniv 2017, arXiv 1705.08500: risk–coverage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy
from scipy.stats import rankdata

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import OptionError


@dataclass(frozen=True)
class Interval:
    """A metric with its interval.

    Attributes
    ----------
    estimate : float
        The metric on the data.
    low, high : float
        Bounds of the interval.
    """

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class EceNull:
    """The ECE of perfectly calibrated models that predict the same probabilities.

    Attributes
    ----------
    mean : float
        Mean ECE over redrawn labels.
    low, high : float
        Bounds of the central 95 %.
    upper95 : float
        95 % quantile: chance does not explain an ECE above it.
    """

    mean: float
    low: float
    high: float
    upper95: float


def _read(p: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    probability = np.asarray(p, dtype=np.float64)
    target = np.asarray(y, dtype=np.float64)
    if probability.ndim != 1 or probability.shape != target.shape or not probability.size:
        raise OptionError(
            f"p and y must be equally long vectors, not {probability.shape} and {target.shape}"
        )
    for name, values in (("p", probability), ("y", target)):
        # Negated, so that NaN counts as outside.
        outside = ~((values >= 0) & (values <= 1))
        if outside.any():
            raise OptionError(f"{name} must lie in [0, 1], not {values[outside][0]}")
    return probability, target


_FLOOR = 2.0**-53  # float64 cannot represent 1 − p for a smaller p


def pair_nll(p: ArrayLike, y: ArrayLike) -> Floats:
    """Negative log-likelihood of each judgment in nats, shape (n_pairs,).

    A verdict of probability 0 costs 36.7 nats, not infinity: probabilities are clipped to 2⁻⁵³,
    since float64 does not tell larger ones from 1. That keeps the loss the same from either side.
    """
    q, t = _read(p, y)
    loss: Floats = -(xlogy(t, np.maximum(q, _FLOOR)) + xlogy(1 - t, np.maximum(1 - q, _FLOOR)))
    return loss


def nll(p: ArrayLike, y: ArrayLike) -> float:
    """Mean negative log-likelihood in nats per judgment; see `pair_nll`."""
    return float(pair_nll(p, y).mean())


def brier(p: ArrayLike, y: ArrayLike) -> float:
    """Mean squared error of the probabilities."""
    q, t = _read(p, y)
    return float(((q - t) ** 2).mean())


def agreement(p: ArrayLike, y: ArrayLike) -> Floats:
    """Contribution of each pair to the accuracy: 1, 0, or ½ for p = ½; a share for split votes."""
    q, t = _read(p, y)
    return np.where(q > 0.5, t, np.where(q < 0.5, 1 - t, 0.5))


def accuracy(p: ArrayLike, y: ArrayLike) -> float:
    """Share of verdicts in favour of the more probable side."""
    return float(agreement(p, y).mean())


def ece(p: ArrayLike, y: ArrayLike, *, bins: int = 20) -> float:
    """Return the expected calibration error on equal-width bins, symmetrised [1]_.

    Each pair counts in both orientations. Otherwise data stored chosen-first would show a large
    error even for perfectly calibrated probabilities.
    """
    q, t = _read(p, y)
    return float(_ece_many(q, t[None, :], bins)[0])


def _ece_many(p: Floats, targets: Floats, bins: int) -> Floats:
    """ECE of one vector of probabilities under (m, n) targets."""
    if bins < 1:
        raise OptionError(f"bins must be at least 1, not {bins}")
    # The larger side's bin, and its mirror image for the other side: at the edge of two bins it
    # must not matter which side is named first. 1e-9: 1 − p is rounded.
    upper = np.minimum((np.maximum(p, 1 - p) * bins + 1e-9).astype(np.int64), bins - 1)
    above = np.where(p >= 0.5, upper, bins - 1 - upper)
    bins_of = np.concatenate([above, bins - 1 - above])
    sums = np.zeros((len(targets), bins))
    # At ½ neither side is the larger one: half of each orientation, which add up to 0.
    residual = np.where(np.abs(p - 0.5) > 1e-12, targets - p, 0.0)
    residual = np.concatenate([residual, -residual], axis=1)
    order = np.argsort(bins_of, kind="stable")
    present, first = np.unique(bins_of[order], return_index=True)
    sums[:, present] = np.add.reduceat(residual[:, order], first, axis=1)
    return np.asarray(np.abs(sums).sum(axis=1) / len(bins_of), dtype=np.float64)


def ece_null(p: ArrayLike, *, bins: int = 20, draws: int = 1000, seed: int = 0) -> EceNull:
    """Return the ECE that chance alone gives, from labels redrawn with the probabilities."""
    q = np.asarray(p, dtype=np.float64)
    _read(q, q)
    rng = np.random.default_rng(seed)
    values = np.concatenate(
        [
            _ece_many(q, (rng.random((min(100, draws - i), len(q))) < q).astype(np.float64), bins)
            for i in range(0, draws, 100)
        ]
    )
    low, high, upper = np.quantile(values, [0.025, 0.975, 0.95])
    return EceNull(float(values.mean()), float(low), float(high), float(upper))


def smooth_ece(p: ArrayLike, y: ArrayLike, *, grid: int = 128) -> float:
    """Calibration error without bins: the fixed point smECE_σ = σ of a reflected kernel [2]_.

    Probabilities are rounded to a grid; the fixed point is interpolated between kernel widths.
    """
    q, t = _read(p, y)
    both = np.concatenate([q, 1 - q])
    residual = np.concatenate([t - q, q - t])
    bins_of = np.minimum((both * grid).astype(np.int64), grid - 1)
    mass = np.bincount(bins_of, residual, minlength=grid) / len(both)
    widths, kernels = _smoothing_kernels(grid)
    errors = np.abs(kernels @ mass).sum(axis=1)
    beyond = np.flatnonzero(errors <= widths)
    if not beyond.size:
        return float(errors[-1])
    last = int(beyond[0])
    if last == 0:
        return float(errors[0])
    gap = errors - widths
    share = gap[last - 1] / (gap[last - 1] - gap[last])
    return float(widths[last - 1] + share * (widths[last] - widths[last - 1]))


@lru_cache(maxsize=4)
def _smoothing_kernels(grid: int) -> tuple[Floats, Floats]:
    """Return widths (m,) and their column-stochastic kernels (m, grid, grid) on the unit interval.

    The Gaussian is reflected at 0 and 1, so that no mass leaves the interval.
    """
    widths = np.geomspace(0.5 / grid, 1.0, 48)
    centres = (np.arange(grid) + 0.5) / grid
    gaps = np.abs(centres[:, None] - centres)
    mirrored = np.minimum(centres[:, None] + centres, 2 - centres[:, None] - centres)
    kernels = np.stack(
        [np.exp(-0.5 * (gaps / w) ** 2) + np.exp(-0.5 * (mirrored / w) ** 2) for w in widths]
    )
    return widths, kernels / kernels.sum(axis=1, keepdims=True)


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Probability that a positive scores above a negative; NaN where a class is empty."""
    ranks = rankdata(np.asarray(scores, dtype=np.float64))
    is_positive = np.asarray(positive, dtype=bool)
    n = int(is_positive.sum())
    m = len(is_positive) - n
    if n == 0 or m == 0:
        return float("nan")
    return float((ranks[is_positive].sum() - n * (n + 1) / 2) / (n * m))


def error_auroc(p: ArrayLike, y: ArrayLike, uncertainty: ArrayLike) -> float:
    """AUROC of an uncertainty as a detector of wrong pairs; ties (y = ½) are left out."""
    q, t = _read(p, y)
    decided = (t != 0.5) & (q != 0.5)
    wrong = (q > 0.5) != (t > 0.5)
    return auroc(np.asarray(uncertainty, dtype=np.float64)[decided], wrong[decided])


def risk_coverage(p: ArrayLike, y: ArrayLike, confidence: ArrayLike) -> tuple[Floats, Floats]:
    """Error rate among the most confident pairs, for every share of them [3]_.

    Returns
    -------
    coverage, risk : ndarray, shape (n_pairs,)
        Share of pairs kept, and error rate among them.
    """
    credit = agreement(p, y)
    order = np.argsort(-np.asarray(confidence, dtype=np.float64), kind="stable")
    kept = np.arange(1, len(order) + 1)
    return kept / len(order), np.cumsum(1 - credit[order]) / kept


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float],
    groups: ArrayLike,
    *,
    draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval over prompts: whole prompts are redrawn.

    Parameters
    ----------
    statistic : callable
        Takes the indices of pairs, shape (m,), with repeats; returns a number.
    groups : array_like of int, shape (n_pairs,)
        Prompt of each pair.
    draws : int
        Bootstrap samples.
    level : float
        Nominal coverage.
    seed : int
        Seed of the draws.

    Returns
    -------
    Interval
        Estimate on all pairs, and percentiles of the draws.
    """
    labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    rng = np.random.default_rng(seed)

    def redraw() -> NDArray[np.int64]:
        chosen = rng.integers(len(members), size=len(members))
        return np.concatenate([members[i] for i in chosen])

    values = [statistic(redraw()) for _ in range(draws)]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(statistic(np.arange(len(labels))), float(low), float(high))
