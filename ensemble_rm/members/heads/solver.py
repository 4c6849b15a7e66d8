"""Linear heads by their optimum: penalised Bradley–Terry regression, which is convex.

A head's weights have the prior N(0, τ²) on features that are standardised and then scaled so that
a typical pair's difference has length 1: τ is the prior standard deviation of a margin, in logits,
whatever the trunk's width. Every τ of the recipe is solved, and the one with the best validation
NLL is kept. No seed matters: heads that read the same view and all pairs would be the same head.

L-BFGS in the coordinates in which the bound of the Hessian, ¼ΣΔΔᵀ + 1/τ² [1]_, is the identity.

References
----------
.. [1] Böhning & Lindsay 1988: a bound of the logistic likelihood's Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.optimize import minimize
from scipy.special import expit

from ensemble_rm.errors import OptionError, TrainingError
from ensemble_rm.members.heads.recipe import HeadRecipe
from ensemble_rm.members.heads.weights import HeadsResult, HeadWeights, PairFeatures
from ensemble_rm.members.learning.seeds import resample_counts, subspace_masks
from ensemble_rm.progress import Progress, silent

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Problem:
    """One head's regression, in rotated coordinates.

    Attributes
    ----------
    z : ndarray, shape (n_pairs, r)
        Differences of the two sides; its columns are orthogonal.
    sums : ndarray, shape (n_pairs, r), optional
        Sums of the two sides, where scores are centred.
    spectrum : ndarray, shape (r,)
        Squared lengths of z's columns.
    back : ndarray, shape (width, r)
        Rotated weights to weights of the features.
    targets, margins, weights : ndarray, shape (n_pairs,)
    """

    z: Floats
    sums: Floats | None
    spectrum: Floats
    back: Floats
    targets: Floats
    margins: Floats
    weights: Floats

    def solve(self, tau: float, centring: float) -> Floats:
        """Return the weights of the features under the prior τ."""
        unit = 1 / np.sqrt(0.25 * self.spectrum * self.weights.mean() + tau**-2)

        def objective(u: Floats) -> tuple[float, Floats]:
            p = unit * u
            x = self.z @ p - self.margins
            loss = np.logaddexp(0.0, x) - self.targets * x
            value = float(self.weights @ loss) + float(p @ p) / (2 * tau**2)
            slope = self.z.T @ (self.weights * (expit(x) - self.targets)) + p / tau**2
            if self.sums is not None:
                level = self.sums @ p
                value += centring * float(self.weights @ level**2)
                slope += 2 * centring * (self.sums.T @ (self.weights * level))
            return value, unit * slope

        options = {"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-7 * len(self.targets)}
        optimum = minimize(
            objective, np.zeros(len(unit)), jac=True, method="L-BFGS-B", options=options
        )
        return np.asarray(self.back @ (unit * optimum.x), dtype=np.float64)


def solve_heads(
    fit: PairFeatures,
    validation: PairFeatures,
    *,
    view_of: list[int],
    recipe: HeadRecipe,
    seeds: list[dict[str, int]],
    progress: Progress = silent,
) -> HeadsResult:
    """Fit k linear heads.

    Parameters
    ----------
    fit, validation : PairFeatures
        The validation pairs only choose each head's τ.
    view_of : list of int
        Which of the features' views each member reads.
    recipe : HeadRecipe
        Its priors, smoothing, centring, bootstrap and subspace.
    seeds : list of dict
        Each member's, by purpose: of bootstrap and subspace.
    progress : callable
        Called with ("training", done, total), in heads.

    Raises
    ------
    OptionError
        If two heads would be the same: same view, no bootstrap, no subspace.
    TrainingError
        If a feature is NaN or infinite.
    """
    k, width = len(view_of), fit.features.shape[2]
    if len(set(view_of)) < k and not recipe.bootstrap and recipe.subspace == 1:
        raise OptionError(
            f"{k} linear heads over {len(set(view_of))} views: heads of one view have one optimum; "
            "give one view per member, bootstrap=True, subspace < 1, or solver='adam'"
        )
    masks = subspace_masks(width, seeds, share=recipe.subspace)
    counts = resample_counts(fit.groups, seeds, bootstrap=recipe.bootstrap)
    arrays: dict[str, list[Floats]] = {"offset": [], "gain": [], "weight": []}
    chosen, losses = [], []
    for member, view in enumerate(view_of):
        progress("training", member, k)
        sides = fit.features[:, view].astype(np.float64)
        if not np.isfinite(sides).all():
            raise TrainingError(
                f"features of member {member} in the training samples are NaN or infinite; use "
                "dtype='float32'"
            )
        offset, gain = _scaling(sides, masks[member])
        problem = _pose((sides - offset) * gain, fit, counts[member], recipe)
        held = (validation.features[:, view].astype(np.float64) - offset) * gain
        weights = [problem.solve(tau, recipe.centring) for tau in recipe.prior]
        nll = [_held_nll(held @ w, validation) for w in weights]
        best = int(np.argmin(nll))
        for name, value in (("offset", offset), ("gain", gain), ("weight", weights[best])):
            arrays[name].append(value)
        chosen.append(recipe.prior[best])
        losses.append(nll)
    progress("training", k, k)
    stacked = {name: np.stack(values) for name, values in arrays.items()}
    history = [
        {"prior": tau, "validation": [nll[i] for nll in losses]}
        for i, tau in enumerate(recipe.prior)
    ]
    return HeadsResult(
        HeadWeights(bias=np.zeros(k), **stacked),
        tuple(chosen),
        tuple(min(nll) for nll in losses),
        history,
    )


def _scaling(sides: Floats, mask: Floats) -> tuple[Floats, Floats]:
    """Return offset and gain: standardised features, a typical difference of length 1."""
    n = len(sides) // 2
    offset, spread = sides.mean(axis=0), sides.std(axis=0)
    gain = np.where(spread > 1e-8 * (1 + np.abs(offset)), mask / (spread + 1e-12), 0.0)
    differences = (sides[:n] - sides[n:]) * gain
    length = float(np.sqrt((differences**2).sum(axis=1).mean()))
    return offset, gain / length if length > 0 else gain


def _pose(scaled: Floats, data: PairFeatures, counts: Floats, recipe: HeadRecipe) -> _Problem:
    """Rotate a head's regression so that its differences have orthogonal columns."""
    n = len(data)
    d, s = scaled[:n] - scaled[n:], scaled[:n] + scaled[n:]
    if n < d.shape[1]:
        values, u = eigh(d @ d.T)
        kept = values > 1e-12 * max(values[-1], 1e-300)
        back = (d.T @ u[:, kept]) / np.sqrt(values[kept])
    else:
        values, back = eigh(d.T @ d)
        kept = values > 1e-12 * max(values[-1], 1e-300)
        back = back[:, kept]
    return _Problem(
        d @ back,
        s @ back if recipe.centring else None,
        values[kept],
        back,
        (1 - recipe.smoothing) * data.targets + recipe.smoothing / 2,
        data.margins,
        counts * data.weights / data.weights.mean(),
    )


def _held_nll(scores: Floats, data: PairFeatures) -> float:
    margins, weights = scores[: len(data)] - scores[len(data) :], data.weights
    losses = np.logaddexp(0.0, margins) - data.targets * margins
    return float((weights * losses).sum() / weights.sum())
