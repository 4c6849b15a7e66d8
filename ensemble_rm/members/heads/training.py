"""How `head` members are trained: texts are read once; heads are fitted to the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.optimize import minimize
from scipy.special import expit

from ensemble_rm.data.samples import Preferences
from ensemble_rm.errors import OptionError, TrainingError
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.backbone.trunk import Trunk, View, features
from ensemble_rm.members.encoding import count_truncation
from ensemble_rm.members.heads.gradient_training import HeadTrainer
from ensemble_rm.members.heads.recipe import HeadRecipe
from ensemble_rm.members.heads.scorer import HeadScorer, parts_of
from ensemble_rm.members.heads.weights import HeadsResult, HeadWeights, PairFeatures
from ensemble_rm.members.learning.job import Job, Trained
from ensemble_rm.members.learning.seeds import resample_counts, subspace_masks
from ensemble_rm.members.scorer import Truncation
from ensemble_rm.progress import Progress, named, silent

Floats = NDArray[np.float64]
SPACE_SAMPLES = 1024  # that say where the training inputs lie


def train_heads(job: Job[HeadRecipe]) -> Trained:
    """Train k heads over one frozen trunk."""
    views = [View.parse(view) for view in job.recipe.views or ()]
    trunk = Trunk(job.backbone, job.options, top=max(v.layer for v in views)).forget_rest()
    cache = None if job.cache_folder is None else FeatureCache(job.cache_folder)
    distinct = tuple(dict.fromkeys(views))
    fit, cut = _read(trunk, job.fit, distinct, cache, named(job.progress, "fit"))
    validation, _ = _read(trunk, job.validation, distinct, cache, named(job.progress, "validation"))
    start = job.only_start(HeadScorer).weights if job.start else None
    result = fit_heads(
        fit,
        validation,
        view_of=[distinct.index(view) for view in views],
        recipe=job.recipe,
        seeds=job.seeds,
        device=trunk.device,
        checkpoint=job.checkpoint,
        digest=job.digest,
        start=start,
        progress=job.progress,
    )
    scorer = HeadScorer(job.backbone, job.options, views, result.weights, trunk=trunk)
    record = {
        "chosen_prior" if job.recipe.is_convex else "chosen_weight_decay": list(result.chosen),
        "validation_nll": list(result.validation_nll),
        "history": result.history,
    }
    reference = scorer.apply(validation.features, distinct)
    return Trained((scorer,), reference, cut, record, _some_features(fit, distinct))


def _some_features(fit: PairFeatures, views: Sequence[View]) -> NDArray[np.float64]:
    """Return what the heads read of training samples drawn at random, as `HeadScorer.features`."""
    n = len(fit.features)
    rows = np.random.default_rng(0).permutation(n)[:SPACE_SAMPLES]
    return parts_of(fit.features[np.sort(rows)], views).astype(np.float64)


def fit_heads(
    fit: PairFeatures,
    validation: PairFeatures,
    *,
    view_of: list[int],
    recipe: HeadRecipe,
    seeds: list[dict[str, int]],
    device: torch.device,
    checkpoint: Path | None = None,
    digest: str = "",
    start: HeadWeights | None = None,
    progress: Progress = silent,
) -> HeadsResult:
    """Fit heads as the recipe says: solved, which has no start, or by Adam, which can resume."""
    data: dict[str, Any] = {"view_of": view_of, "recipe": recipe, "seeds": seeds}
    if recipe.is_convex:
        return solve_heads(fit, validation, **data, progress=progress)
    resume: dict[str, Any] = {"checkpoint": checkpoint, "digest": digest}
    trainer = HeadTrainer(fit, validation, **data, **resume, device=device, start=start)
    return trainer.run(progress=progress)


def _read(
    trunk: Trunk,
    pairs: Preferences,
    views: Sequence[View],
    cache: FeatureCache | None,
    progress: Progress,
) -> tuple[PairFeatures, Truncation]:
    encoded = trunk.encoder.encode(pairs.samples())
    read = features(trunk, encoded, views, cache=cache, progress=progress)
    data = PairFeatures(read, pairs.targets, pairs.weights, pairs.margins, pairs.groups)
    return data, count_truncation(encoded)


# Solved heads ------------------------------------------------------------------------------------


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
        # Preconditioned by the curvature at p = ½: the search then takes few steps at any τ.
        unit = 1 / np.sqrt(0.25 * self.spectrum * self.weights.mean() + tau**-2)

        def objective(u: Floats) -> tuple[float, Floats]:
            p = unit * u
            # Margin of the pair minus the target margin, shape (n_pairs,).
            x = self.z @ p - self.margins
            # logaddexp: exact where exp would overflow.
            loss = np.logaddexp(0.0, x) - self.targets * x
            value = float(self.weights @ loss) + float(p @ p) / (2 * tau**2)
            slope = self.z.T @ (self.weights * (expit(x) - self.targets)) + p / tau**2
            # Centring penalises the level of both sides, of which the margin says nothing.
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
    """Fit k linear heads by their optimum: penalised Bradley–Terry regression, which is convex.

    A head's weights have the prior N(0, τ²) on features that are standardised and then scaled so
    that a typical pair's difference has length 1: τ is the prior standard deviation of a margin,
    in logits, whatever the trunk's width. Every τ of the recipe is solved, and the one with the
    best validation NLL is kept. No seed matters: heads that read the same view and all pairs would
    be the same head.

    L-BFGS runs in the coordinates in which the bound of the Hessian, ¼ΣΔΔᵀ + 1/τ² [1]_, is the
    identity.

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

    References
    ----------
    .. [1] Böhning & Lindsay 1988: a bound of the logistic likelihood's Hessian.
    """
    k, width = len(view_of), fit.features.shape[2]
    # Such members would be copies, and their spread 0.
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
        # (2·n_pairs, width) in float64: normal equations of float32 lose half the digits.
        sides = fit.features[:, view].astype(np.float64)
        if not np.isfinite(sides).all():
            raise TrainingError(
                f"features of member {member} in the training samples are NaN or infinite; use "
                "dtype='float32'"
            )
        offset, gain = _scaling(sides, masks[member])
        problem = _pose((sides - offset) * gain, fit, counts[member], recipe)
        # Scaled by the training samples alone.
        held = (validation.features[:, view].astype(np.float64) - offset) * gain
        weights = [problem.solve(tau, recipe.centring) for tau in recipe.prior]
        nll = [_held_nll(held @ w, validation) for w in weights]
        # The prior is chosen on validation pairs; each member chooses its own.
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
    # A constant feature gets gain 0 instead of a division by rounding noise.
    gain = np.where(spread > 1e-8 * (1 + np.abs(offset)), mask / (spread + 1e-12), 0.0)
    differences = (sides[:n] - sides[n:]) * gain
    # A typical difference of length 1 gives one grid of priors for all backbones.
    length = float(np.sqrt((differences**2).sum(axis=1).mean()))
    return offset, gain / length if length > 0 else gain


def _pose(scaled: Floats, data: PairFeatures, counts: Floats, recipe: HeadRecipe) -> _Problem:
    """Rotate a head's regression so that its differences have orthogonal columns."""
    n = len(data)
    d, s = scaled[:n] - scaled[n:], scaled[:n] + scaled[n:]
    # The smaller of n and width bounds the rank, and the cost of the eigenvectors.
    if n < d.shape[1]:
        values, u = eigh(d @ d.T)
        # Directions of rounding noise are left out.
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
        # Bootstrap counts times weights of mean 1: the prior's strength does not depend on their
        # unit.
        counts * data.weights / data.weights.mean(),
    )


def _held_nll(scores: Floats, data: PairFeatures) -> float:
    margins, weights = scores[: len(data)] - scores[len(data) :], data.weights
    losses = np.logaddexp(0.0, margins) - data.targets * margins
    return float((weights * losses).sum() / weights.sum())
