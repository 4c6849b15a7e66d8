"""One temperature per annotator, shrunk towards the typical one: how reliable each is.

P(annotator a prefers the first) = σ(Δ/Tₐ): the lower Tₐ, the more the annotator's verdicts follow
the reward. log Tₐ is drawn from a normal of centre μ and spread τ over annotators, both fitted on
the marginal likelihood, integrated over a grid of log T: empirical Bayes [1]_. Each annotator gets
its posterior, so that annotators with few verdicts, or with verdicts that alone would put T at 0 or
at infinity, have a temperature, too.

Verdicts of one annotator on one prompt may be correlated. The log-likelihood is therefore divided
by their design effect, at least 1: the ratio of the variances of log T with and without clusters,
as in a power likelihood [2]_.

References
----------
.. [1] Morris 1983, JASA 78: parametric empirical Bayes inference.
.. [2] Holmes & Walker 2017, Biometrika 104: the power of a likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.limits import MIN_JUDGMENTS
from ensemble_rm.calibration.methods.temperature import (
    fit_temperature,
    margin_losses,
    read_judgments,
)
from ensemble_rm.errors import OptionError
from ensemble_rm.saved_json import from_row

_REACH, _STEP = 5.0, 0.05  # grid of log T, around that of all judgments
_SPREADS = (0.05, 3.0)  # range of τ; below it τ is 0


@dataclass(frozen=True)
class AnnotatorFit:
    """One annotator's posterior.

    Attributes
    ----------
    name : str
    temperature : float
        exp of the mean of log T.
    low, high : float
        Bounds of its 95 % interval, given the fitted centre and spread.
    judgments : int
        Number of this annotator's judgments.
    """

    name: str
    temperature: float
    low: float
    high: float
    judgments: int


@dataclass(frozen=True)
class Reliability:
    """Temperatures of annotators.

    Attributes
    ----------
    temperature : float
        exp μ, that of the typical annotator, which unknown annotators get.
    spread : float
        τ of log T among annotators; 0 where chance explains their differences.
    design_effect : float
        ≥ 1; the log-likelihood was divided by it.
    annotators : tuple of AnnotatorFit
        Sorted by name.
    """

    temperature: float
    spread: float
    design_effect: float
    annotators: tuple[AnnotatorFit, ...]

    def temperature_of(self, annotator: str) -> float:
        """Return the temperature of an annotator; the typical one for an unknown name."""
        known = (fit.temperature for fit in self.annotators if fit.name == annotator)
        return next(known, self.temperature)

    def probability(self, margins: ArrayLike, annotators: Sequence[str]) -> Floats:
        """Return P(the annotator prefers the first), σ(Δ/Tₐ), shape (n_judgments,)."""
        x = np.asarray(margins, dtype=np.float64)
        if x.shape != (len(annotators),):
            raise OptionError(f"{len(annotators)} annotators for margins of shape {x.shape}")
        known = {name: self.temperature_of(name) for name in dict.fromkeys(annotators)}
        return np.asarray(expit(x / np.array([known[name] for name in annotators])))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: Any) -> Reliability:
        """Read what `to_json` wrote, else `SchemaError`."""
        return from_row(cls, d)


def fit_reliability(
    margins: ArrayLike,
    targets: ArrayLike,
    annotators: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    min_judgments: int = MIN_JUDGMENTS,
) -> Reliability:
    """Fit each annotator's temperature, the typical one, and their spread.

    Parameters
    ----------
    margins : array_like, shape (n_judgments,)
        Aggregated reward of the first minus that of the second.
    targets : array_like, shape (n_judgments,)
        1 where the annotator preferred the first, 0 the second, ½ a tie.
    annotators : sequence of str, shape (n_judgments,)
        Annotator of each judgment.
    weights : array_like, shape (n_judgments,), optional
        Weight of each judgment, > 0.
    groups : array_like of int, shape (n_judgments,), optional
        Prompt of each judgment (default: all differ).
    min_judgments : int
        Minimum number of judgments with a margin other than 0, over all annotators.

    Returns
    -------
    Reliability
        The same for either orientation of the pairs.

    Raises
    ------
    OptionError
        If there are fewer than two annotators, or lengths differ.
    TooFewJudgmentsError, SeparableError, NoPositiveTemperatureError
        If no temperature fits all judgments together; see `fit_temperature`.
    """
    x, y, w = read_judgments(margins, targets, weights, min_judgments=min_judgments)
    names, annotator_of = np.unique(np.asarray(annotators, dtype=str), return_inverse=True)
    # With one annotator the spread between annotators is not identified.
    if len(annotators) != len(x) or len(names) < 2:
        raise OptionError(
            f"reliability needs one annotator per judgment and at least two annotators, not "
            f"{len(annotators)} entries of {len(names)} annotators for {len(x)} judgments"
        )
    rows = np.arange(len(x)) if groups is None else np.asarray(groups)
    if rows.shape != x.shape:
        raise OptionError(f"{rows.size} groups for {len(x)} judgments")
    # Judgments of one annotator on one prompt are the clusters: they share both errors.
    both = np.stack([annotator_of, np.unique(rows, return_inverse=True)[1]])
    clusters = np.unique(both, axis=1, return_inverse=True)[1].reshape(-1)
    overall = fit_temperature(x, y, weights=w, groups=clusters, min_judgments=min_judgments)
    effect = _design_effect(x, w, overall.temperature, overall.log_se)
    grid = math.log(overall.temperature) + np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
    # Divided by the design effect: clustered judgments carry less information than their number.
    fits = _likelihoods(x, y, w, annotator_of, grid) / effect  # (n_annotators, n_grid)
    centre, spread = _prior(fits, grid)
    posterior = fits + _log_normal(grid, centre, spread)
    # In logs, since likelihoods of thousands of judgments underflow.
    posterior = np.exp(posterior - logsumexp(posterior, axis=1, keepdims=True))
    mean = posterior @ grid
    # A difference of squares may round below 0.
    sd = np.sqrt(np.maximum(posterior @ grid**2 - mean**2, 0.0))
    posteriors = [
        AnnotatorFit(
            str(name), math.exp(m), math.exp(m - 1.96 * s), math.exp(m + 1.96 * s), int(count)
        )
        for name, m, s, count in zip(names, mean, sd, np.bincount(annotator_of), strict=True)
    ]
    return Reliability(math.exp(centre), spread, effect, tuple(posteriors))


def _design_effect(x: Floats, w: Floats, temperature: float, log_se: float) -> float:
    """Return the clustered variance of log T over that of independent judgments of weight w."""
    p = np.asarray(expit(x / temperature))
    information = float((w * p * (1 - p) * (x / temperature) ** 2).sum())
    # At least 1: a lucky sample must not count for more than independent judgments.
    return max(1.0, log_se**2 * information)


def _likelihoods(x: Floats, y: Floats, w: Floats, annotator_of: Any, grid: Floats) -> Floats:
    """Return each annotator's log-likelihood at each log T."""
    columns = []
    for log_t in grid:
        loss = w * margin_losses(x * math.exp(-log_t), y)
        columns.append(-np.bincount(annotator_of, loss))
    return np.asarray(np.stack(columns, axis=1), dtype=np.float64)


def _log_normal(grid: Floats, centre: float, spread: float) -> Floats:
    """Return log-weights of a normal on the grid; for spread 0 all on the nearest point."""
    if spread == 0:
        return np.where(np.arange(len(grid)) == np.argmin(np.abs(grid - centre)), 0.0, -np.inf)
    logs = -0.5 * ((grid - centre) / spread) ** 2
    return np.asarray(logs - logsumexp(logs), dtype=np.float64)


def _prior(fits: Floats, grid: Floats) -> tuple[float, float]:
    """Return centre and spread that maximise the marginal likelihood; spread 0 on a tie."""

    def loss(point: Floats) -> float:
        centre, log_spread = point
        spread = math.exp(np.clip(log_spread, *np.log(_SPREADS)))
        # A penalty, since Nelder-Mead knows no bounds.
        outside = max(0.0, float(abs(centre - grid.mean())) - _REACH)
        return outside - float(logsumexp(fits + _log_normal(grid, centre, spread), axis=1).sum())

    alone = int(np.argmax(fits.sum(axis=0)))
    # Several starts: the marginal likelihood may have a second maximum at a large spread.
    starts = [np.array([grid[alone], math.log(spread)]) for spread in (0.1, 0.3, 1.0)]
    options = {"xatol": 1e-6, "fatol": 1e-9}
    runs = [minimize(loss, start, method="Nelder-Mead", options=options) for start in starts]
    best = min(runs, key=lambda run: float(run.fun))
    # No gain over one common temperature: a spread of 0 is the simpler model.
    if best.fun >= -float(fits[:, alone].sum()) - 1e-9:
        return float(grid[alone]), 0.0
    return float(best.x[0]), float(math.exp(np.clip(best.x[1], *np.log(_SPREADS))))
