"""`head` members: features, heads, a scorer."""

from __future__ import annotations

from collections.abc import Sequence

from ensemble_rm.members.cache import FeatureCache, features
from ensemble_rm.members.heads import HeadScorer
from ensemble_rm.members.text import Truncation, count_truncation
from ensemble_rm.members.trunk import Progress, Trunk, View
from ensemble_rm.samples import Preferences
from ensemble_rm.training.heads import HeadTrainer, PairFeatures
from ensemble_rm.training.job import Job, Trained


def train_heads(job: Job) -> Trained:
    """Train k heads over one frozen trunk."""
    trunk = Trunk(job.backbone, job.options, top=max(v.layer for v in job.views)).forget_rest()
    cache = None if job.cache_folder is None else FeatureCache(job.cache_folder)
    distinct = tuple(dict.fromkeys(job.views))
    fit, cut = _read(trunk, job.fit, distinct, cache, job.named("fit"))
    validation, _ = _read(trunk, job.validation, distinct, cache, job.named("validation"))
    result = HeadTrainer(
        fit,
        validation,
        view_of=[distinct.index(view) for view in job.views],
        recipe=job.recipe,
        seeds=job.seeds,
        device=trunk.device,
        checkpoint=job.checkpoint,
        digest=job.digest,
    ).run(progress=job.progress)
    scorer = HeadScorer(job.backbone, job.options, job.views, result.weights, trunk=trunk)
    record = {
        "chosen_weight_decay": list(result.weight_decay),
        "validation_nll": list(result.validation_nll),
        "history": result.history,
    }
    return Trained((scorer,), scorer.apply(validation.features, distinct), cut, record)


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
