"""One temperature an annotator, drawn towards the typical one: how reliable each of them is.

P(annotator a prefers the first) = σ(Δ/Tₐ): the lower Tₐ, the more the annotator's verdicts follow
the reward. log Tₐ is drawn from a normal of centre μ and spread τ over annotators, both fitted on
the marginal likelihood, integrated over a grid of log T: empirical Bayes [1]_. What is reported is
each annotator's posterior. So those with few verdicts, or with verdicts that alone would put T at 0
or at infinity, have a temperature, too.

Verdicts of one annotator on one prompt may depend on one another. The log-likelihood is divided by
their design effect, the ratio of the variances of log T with and without clusters, as in a power
likelihood [2]_; at least 1.

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

_REACH, _STEP = 5.0, 0.05  # of the grid of log T, about that of all judgments
_SPREADS = (0.05, 3.0)  # of τ; below the first it is 0


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
        Of this annotator.
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
        exp μ, the typical annotator's: what one gets who is not among them.
    spread : float
        τ of log T among annotators; 0 where they do not differ more than by chance.
    design_effect : float
        ≥ 1, by which the log-likelihood was divided.
    annotators : tuple of AnnotatorFit
        By name.
    """

    temperature: float
    spread: float
    design_effect: float
    annotators: tuple[AnnotatorFit, ...]

    def temperature_of(self, annotator: str) -> float:
        """Return T of an annotator; the typical one of a name that is not among them."""
        known = (one.temperature for one in self.annotators if one.name == annotator)
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
        """Read what `to_json` wrote."""
        return cls(**{**d, "annotators": tuple(AnnotatorFit(**one) for one in d["annotators"])})


def fit_reliability(
    margins: ArrayLike,
    targets: ArrayLike,
    annotators: Sequence[str],
    *,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    min_judgments: int = MIN_JUDGMENTS,
) -> Reliability:
    """Fit each annotator's temperature, the typical one, and how far they lie apart.

    Parameters
    ----------
    margins : array_like, shape (n_judgments,)
        Aggregated reward of the first minus that of the second.
    targets : array_like, shape (n_judgments,)
        1 where the annotator preferred the first, 0 the second, ½ a tie.
    annotators : sequence of str, shape (n_judgments,)
        Who judged.
    weights : array_like, shape (n_judgments,), optional
        How much each judgment counts, > 0.
    groups : array_like of int, shape (n_judgments,), optional
        Prompt of each; each its own where not given.
    min_judgments : int
        The fewest of non-zero margin, of all annotators together.

    Returns
    -------
    Reliability
        Indifferent to the orientation of the pairs.

    Raises
    ------
    OptionError
        If there are fewer than two annotators, or lengths differ.
    TooFewJudgmentsError, SeparableError, NoPositiveTemperatureError
        If all judgments together have no temperature; see `fit_temperature`.
    """
    x, y, w = read_judgments(margins, targets, weights, min_judgments=min_judgments)
    names, place = np.unique(np.asarray(annotators, dtype=str), return_inverse=True)
    if len(annotators) != len(x) or len(names) < 2:
        raise OptionError(f"{len(annotators)} entries of {len(names)} annotators for {len(x)}")
    rows = np.arange(len(x)) if groups is None else np.asarray(groups)
    if rows.shape != x.shape:
        raise OptionError(f"{rows.size} groups for {len(x)} judgments")
    both = np.stack([place, np.unique(rows, return_inverse=True)[1]])
    clusters = np.unique(both, axis=1, return_inverse=True)[1].reshape(-1)
    overall = fit_temperature(x, y, weights=w, groups=clusters, min_judgments=min_judgments)
    effect = _design_effect(x, w, overall.temperature, overall.log_se)
    grid = math.log(overall.temperature) + np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
    fits = _likelihoods(x, y, w, place, grid) / effect  # (n_annotators, n_grid)
    centre, spread = _prior(fits, grid)
    posterior = fits + _log_normal(grid, centre, spread)
    posterior = np.exp(posterior - logsumexp(posterior, axis=1, keepdims=True))
    mean = posterior @ grid
    sd = np.sqrt(np.maximum(posterior @ grid**2 - mean**2, 0.0))
    found = [
        AnnotatorFit(
            str(name), math.exp(m), math.exp(m - 1.96 * s), math.exp(m + 1.96 * s), int(count)
        )
        for name, m, s, count in zip(names, mean, sd, np.bincount(place), strict=True)
    ]
    return Reliability(math.exp(centre), spread, effect, tuple(found))


def _design_effect(x: Floats, w: Floats, temperature: float, log_se: float) -> float:
    """Return the clustered variance of log T over that of independent judgments of weight w."""
    p = np.asarray(expit(x / temperature))
    information = float((w * p * (1 - p) * (x / temperature) ** 2).sum())
    return max(1.0, log_se**2 * information)


def _likelihoods(x: Floats, y: Floats, w: Floats, place: Any, grid: Floats) -> Floats:
    """Return each annotator's log-likelihood at each log T."""
    columns = []
    for log_t in grid:
        loss = w * margin_losses(x * math.exp(-log_t), y)
        columns.append(-np.bincount(place, loss))
    return np.asarray(np.stack(columns, axis=1), dtype=np.float64)


def _log_normal(grid: Floats, centre: float, spread: float) -> Floats:
    """Return a normal's log-weights on the grid; all on the nearest point where spread is 0."""
    if spread == 0:
        return np.where(np.arange(len(grid)) == np.argmin(np.abs(grid - centre)), 0.0, -np.inf)
    logs = -0.5 * ((grid - centre) / spread) ** 2
    return np.asarray(logs - logsumexp(logs), dtype=np.float64)


def _prior(fits: Floats, grid: Floats) -> tuple[float, float]:
    """Return the centre and spread of the largest marginal likelihood; 0 if that does as well."""

    def loss(point: Floats) -> float:
        centre, log_spread = point
        spread = math.exp(np.clip(log_spread, *np.log(_SPREADS)))
        outside = max(0.0, float(abs(centre - grid.mean())) - _REACH)
        return outside - float(logsumexp(fits + _log_normal(grid, centre, spread), axis=1).sum())

    alone = int(np.argmax(fits.sum(axis=0)))
    starts = [np.array([grid[alone], math.log(spread)]) for spread in (0.1, 0.3, 1.0)]
    options = {"xatol": 1e-6, "fatol": 1e-9}
    runs = [minimize(loss, start, method="Nelder-Mead", options=options) for start in starts]
    best = min(runs, key=lambda run: float(run.fun))
    if best.fun >= -float(fits[:, alone].sum()) - 1e-9:
        return float(grid[alone]), 0.0
    return float(best.x[0]), float(math.exp(np.clip(best.x[1], *np.log(_SPREADS))))
