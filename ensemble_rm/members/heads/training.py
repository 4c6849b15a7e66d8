"""`head` members: features, heads, a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_rm.data.samples import Preferences
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.backbone.trunk import Trunk, View, features
from ensemble_rm.members.encoding import count_truncation
from ensemble_rm.members.heads.gradient_training import HeadTrainer
from ensemble_rm.members.heads.recipe import HeadRecipe
from ensemble_rm.members.heads.scorer import HeadScorer, parts_of
from ensemble_rm.members.heads.solver import solve_heads
from ensemble_rm.members.heads.weights import HeadsResult, HeadWeights, PairFeatures
from ensemble_rm.members.learning.job import Job, Trained
from ensemble_rm.members.scorer import Truncation
from ensemble_rm.progress import Progress, named, silent

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
