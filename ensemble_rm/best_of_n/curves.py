"""Best-of-n curves: unbiased mean gold, KL from the policy, and fits of Gao et al.'s curves.

Works on arrays of proxy and gold scores; a proxy is one number per sample from any source.

References
----------
.. [1] Gao, Schulman & Hilton 2022, arXiv 2210.10760: the KL of best-of-n, the unbiased estimator
   (appendix A, after Nakano et al. 2021) and the two curves of gold against d = √KL.
.. [2] Fieller 1954: the interval of a ratio of two estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import NonFiniteScoreError, OptionError

CurveForm: TypeAlias = Literal["best_of_n", "rl"]

_BLOCK = 1 << 21  # scores sorted at once: 16 MiB an array


def _sizes(n: ArrayLike, samples: int | None = None) -> NDArray[np.int64]:
    raw = np.asarray(n)
    if raw.dtype.kind not in "iu" or raw.ndim > 1 or raw.size == 0:
        raise OptionError(f"n must be a whole number or a list of them, not {n!r}")
    sizes: NDArray[np.int64] = np.atleast_1d(raw).astype(np.int64)
    if sizes.min() < 1:
        raise OptionError(f"n must be at least 1, not {sizes.min()}")
    if samples is not None and sizes.max() > samples:
        raise OptionError(
            f"best of {sizes.max()} cannot be estimated without bias from {samples} samples; "
            "draw more, or ask for a smaller n"
        )
    return sizes


def best_of_n_kl(n: ArrayLike) -> Floats:
    """KL(best-of-n ‖ policy) = log n − (n − 1)/n, in nats [1]_.

    Exact where two samples are never equal; an upper bound for discrete samples, such as those of
    language models, and where the proxy has ties.

    Parameters
    ----------
    n : int or array_like of int
        Number of samples that the best is chosen from, ≥ 1.

    Returns
    -------
    ndarray of float64
        In the shape of `n`.

    Raises
    ------
    OptionError
        If an n is below 1 or not whole.
    """
    sizes = _sizes(n).astype(np.float64)
    return (np.log(sizes) - (sizes - 1) / sizes).reshape(np.shape(n))


def best_of_n_weights(samples: int, n: ArrayLike) -> Floats:
    """P(the i-th of N samples, ascending, is the best of a random n): C(i−1, n−1)/C(N, n) [1]_.

    The last weight is n/N, and neighbours differ by the factor (i − n + 1)/i, so a running sum of
    logarithms gives all weights without binomials, which would overflow.

    Parameters
    ----------
    samples : int
        N.
    n : int or array_like of int, shape (n_sizes,)
        From 1 to N.

    Returns
    -------
    ndarray of float64, shape (n_sizes, N)
        Each row sums to 1.

    Raises
    ------
    OptionError
        If an n is not whole, below 1 or above N.
    """
    sizes = _sizes(n, samples)
    rank = np.arange(1, samples, dtype=np.float64)  # i of every ratio w_i / w_{i+1}
    weights = np.zeros((len(sizes), samples))
    for row, size in zip(weights, sizes, strict=True):
        row[-1] = size / samples
        ratios = np.log1p(-(size - 1) / rank[size - 1 :])  # i ≥ n: below, the weight is 0
        row[size - 1 : -1] = np.exp(math.log(size / samples) + np.cumsum(ratios[::-1])[::-1])
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def best_of_n_curve(proxy: ArrayLike, gold: ArrayLike, n: ArrayLike) -> Floats:
    """Estimate the mean gold of the best of n by the proxy, from N ≥ n samples per prompt.

    Unbiased: the mean over all C(N, n) subsets [1]_. Samples that tie in the proxy count with the
    mean of their golds: among equal maxima each is chosen with the same probability, whatever their
    order.

    Parameters
    ----------
    proxy : array_like, shape (N,) or (n_prompts, N)
        Score that the best is chosen by.
    gold : array_like
        Gold score of each sample, in the shape of `proxy`.
    n : int or array_like of int, shape (n_sizes,)
        From 1 to N.

    Returns
    -------
    ndarray of float64
        The shape of `proxy` without N, then that of `n`.

    Raises
    ------
    OptionError
        If shapes differ, or an n is not whole, below 1 or above N.
    NonFiniteScoreError
        If a score is NaN or infinite.
    """
    proxies, golds = (np.asarray(x, dtype=np.float64) for x in (proxy, gold))
    if proxies.shape != golds.shape or proxies.ndim not in (1, 2) or proxies.shape[-1] == 0:
        raise OptionError(
            f"proxy and gold must have the same shape, (N,) or (n_prompts, N) with N ≥ 1, not "
            f"{proxies.shape} and {golds.shape}"
        )
    for name, scores in (("proxy", proxies), ("gold", golds)):
        if (bad := ~np.isfinite(scores)).any():
            position = tuple(int(i) for i in np.argwhere(bad)[0])
            raise NonFiniteScoreError(
                f"{int(bad.sum())} {name} scores are NaN or infinite, the first at {position}; "
                "leave such samples out of both"
            )
    samples = proxies.shape[-1]
    weights = best_of_n_weights(samples, n)
    rows, golds = proxies.reshape(-1, samples), golds.reshape(-1, samples)
    gold_of_best = np.empty((len(rows), len(weights)))
    step = max(1, _BLOCK // samples)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        gold_of_best[part] = _ascending(rows[part], golds[part]) @ weights.T
    return gold_of_best.reshape((*proxies.shape[:-1], *np.shape(n)))


def _ascending(proxy: Floats, gold: Floats) -> Floats:
    """Return each row's golds by ascending proxy, tied ones replaced by their mean."""
    order = np.argsort(proxy, axis=1)  # ties get their mean below, so their order does not matter
    keys = np.take_along_axis(proxy, order, axis=1)
    worth = np.take_along_axis(gold, order, axis=1)
    first = np.ones(keys.shape, dtype=np.bool_)
    first[:, 1:] = keys[:, 1:] != keys[:, :-1]
    if first.all():
        return worth
    group = np.cumsum(first.ravel()) - 1
    counts = np.bincount(group)
    means = np.bincount(group, weights=worth.ravel()) / counts
    # Without a tie gold stays exact to the last digit.
    shared = np.where(counts[group] > 1, means[group], worth.ravel())
    return shared.reshape(worth.shape)


@dataclass(frozen=True)
class CurveFit:
    """A fit of Gao's curve of gold against d = √KL, with 95 % intervals [1]_.

    Attributes
    ----------
    form : {"best_of_n", "rl"}
        R(d) = d(α − βd), or R(d) = d(α − β log d).
    alpha, beta : float
        Gold per unit of d (of d², for β of best-of-n).
    alpha_interval, beta_interval : tuple of float
        By Student's t.
    peak : float
        d of the highest gold: α/2β, or exp(α/β − 1); infinite where β ≤ 0, 0 where α ≤ 0 < β
        in the first form.
    peak_interval : tuple of float
        By Fieller [2]_; its end is infinite where β does not differ from 0 significantly.
    curves : int
        Number of curves that the intervals are based on; with 1 they are based on its residuals, as
        if these were independent.
    """

    form: CurveForm
    alpha: float
    beta: float
    alpha_interval: tuple[float, float]
    beta_interval: tuple[float, float]
    peak: float
    peak_interval: tuple[float, float]
    curves: int

    def __call__(self, d: ArrayLike) -> Floats:
        """Return R(d), the gain in gold over the policy."""
        straight, bent = np.moveaxis(_terms(np.asarray(d, dtype=np.float64), self.form), -1, 0)
        curve: Floats = self.alpha * straight + self.beta * bent
        return curve


def _terms(d: Floats, form: CurveForm) -> Floats:
    """Return the factors of α and β, shape (…, 2)."""
    if form == "best_of_n":
        return np.stack([d, -(d**2)], axis=-1)
    positive = np.where(d > 0, d, 1.0)
    return np.stack([d, -d * np.log(positive)], axis=-1)


def fit_curve(d: ArrayLike, gold: ArrayLike, *, form: CurveForm = "best_of_n") -> CurveFit:
    """Fit Gao's curve of gold against d by least squares.

    Parameters
    ----------
    d : array_like, shape (n_points,)
        √KL from the initial policy, ≥ 0.
    gold : array_like, shape (n_points,) or (n_curves, n_points)
        Gain in gold over d = 0. With several curves, from repeats or seeds, the intervals are based
        on the spread among them. Points of one best-of-n curve share samples, so the intervals of a
        single curve are too narrow.
    form : {"best_of_n", "rl"}
        Form of the curve.

    Returns
    -------
    CurveFit

    Raises
    ------
    OptionError
        If shapes do not fit, d is negative, or fewer than two (three, for a single curve) distinct
        positive d are given.
    NonFiniteScoreError
        If a value is NaN or infinite.
    """
    if form not in ("best_of_n", "rl"):
        raise OptionError(f"form must be 'best_of_n' or 'rl', not {form!r}")
    x, y = np.asarray(d, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if x.ndim != 1 or y.ndim not in (1, 2) or y.shape[-1] != len(x) or y.size == 0:
        raise OptionError(f"d of shape {x.shape} and gold of shape {y.shape} do not fit")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise NonFiniteScoreError(
            "some values of d or gold are NaN or infinite; leave such points out"
        )
    curves = y.reshape(-1, len(x))
    distinct, needed = len(np.unique(x[x > 0])), 3 if len(curves) == 1 else 2
    if x.min() < 0 or distinct < needed:
        raise OptionError(f"a fit needs {needed} distinct d > 0 and none below 0, not {x.tolist()}")
    terms = _terms(x, form)
    each = np.linalg.lstsq(terms, curves.T, rcond=None)[0].T  # (n_curves, 2)
    estimate = each.mean(axis=0)
    covariance: Floats
    if len(curves) > 1:
        covariance = np.cov(each, rowvar=False) / len(curves)
        freedom = len(curves) - 1
    else:
        freedom = len(x) - 2
        noise = float(((curves[0] - terms @ estimate) ** 2).sum()) / freedom
        covariance = np.asarray(noise * np.linalg.inv(terms.T @ terms), dtype=np.float64)
    t = float(stdtrit(freedom, 0.975))
    return _described(form, estimate, covariance, t, len(curves))


def _described(
    form: CurveForm, estimate: Floats, covariance: Floats, t: float, curves: int
) -> CurveFit:
    alpha, beta = (float(value) for value in estimate)
    half = t * np.sqrt(np.diag(covariance))
    ratio = alpha / beta if beta > 0 else math.inf
    low, high = _fieller(alpha, beta, covariance, t)
    return CurveFit(
        form,
        alpha,
        beta,
        (float(alpha - half[0]), float(alpha + half[0])),
        (float(beta - half[1]), float(beta + half[1])),
        _peak(ratio, form),
        (_peak(low, form), _peak(high, form)),
        curves,
    )


def _peak(ratio: float, form: CurveForm) -> float:
    """Return the d of the peak for α/β: R′ = α − 2βd, or α − β − β log d, is 0 there."""
    if form == "best_of_n":
        return max(0.0, ratio / 2)
    return math.exp(ratio - 1) if ratio < 700 else math.inf  # 700: exp's range


def _fieller(a: float, b: float, covariance: Floats, t: float) -> tuple[float, float]:
    """Return the interval of a/b: every ρ for which a − ρb may be 0; (…, ∞) where b may be ≤ 0."""
    v, t2 = covariance, t * t
    square = b * b - t2 * v[1, 1]
    cross = a * b - t2 * v[0, 1]
    rest = a * a - t2 * v[0, 0]
    inside = cross * cross - square * rest
    if square > 0:
        if b < 0:  # the curve bends upwards significantly: no peak
            return math.inf, math.inf
        root = math.sqrt(max(inside, 0.0))
        return (cross - root) / square, (cross + root) / square
    if a <= 0 or rest <= 0 or square == 0:  # a may be 0, or is below it
        return -math.inf, math.inf
    # Only values between the negative and the positive root are excluded: rest/square < 0.
    return (cross - math.sqrt(inside)) / square, math.inf
