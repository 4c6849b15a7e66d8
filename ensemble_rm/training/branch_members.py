"""`branch` members: token states, heads to start from, branches, a scorer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_rm.members.batching import plan
from ensemble_rm.members.branches import BranchScorer
from ensemble_rm.members.branching import Branching
from ensemble_rm.members.head_weights import HeadWeights
from ensemble_rm.members.pooling import Pooling
from ensemble_rm.members.states import TokenStates, token_states
from ensemble_rm.members.text import count_truncation
from ensemble_rm.members.trunk import Trunk
from ensemble_rm.samples import Preferences
from ensemble_rm.training.branches import Branch, BranchTrainer, PairStates
from ensemble_rm.training.heads import HeadTrainer, PairFeatures
from ensemble_rm.training.job import Job, Trained
from ensemble_rm.training.recipe import Recipe


def train_branches(job: Job) -> Trained:
    """Train k copies of the top blocks, each with a head, over one trunk."""
    depth = job.views[0].layer
    trunk = Trunk(job.backbone, job.options, top=depth - job.blocks)
    branching = Branching(trunk)
    with _folder(job) as folder:
        fit, validation = (
            _read(job, trunk, pairs, folder, part)
            for pairs, part in ((job.fit, "fit"), (job.validation, "validation"))
        )
        heads = _first_heads(job, branching, fit, validation)
        trainer = BranchTrainer(
            branching,
            fit,
            validation,
            branches=[
                Branch(trunk.rest, heads, i, view.pooling) for i, view in enumerate(job.views)
            ],
            recipe=job.recipe,
            seeds=job.seeds,
            checkpoint=job.checkpoint,
            digest=job.digest,
        )
        result = trainer.run(progress=job.progress)
        trained = replace(
            heads,
            weight=np.stack([b.weight.detach().double().numpy() for b in result.branches]),
            bias=np.array([b.bias.item() for b in result.branches]),
        )
        scorer = BranchScorer(
            job.backbone,
            job.options,
            job.views,
            trained,
            [dict(branch.blocks.state_dict()) for branch in result.branches],
            blocks=job.blocks,
            branching=branching,
        )
        reference = scorer.score(job.validation.samples())
    size = fit.states.path.stat().st_size if fit.states.path.exists() else 0
    record = {
        "validation_nll": list(result.validation_nll),
        "history": result.history,
        "token_states_bytes": size,
    }
    return Trained((scorer,), reference, count_truncation(fit.states.encoded), record)


@contextmanager
def _folder(job: Job) -> Iterator[Path]:
    """Keep token states in the cache, or in a folder of their own that goes with the run."""
    if job.cache_folder is not None:
        yield job.cache_folder
        return
    with tempfile.TemporaryDirectory(prefix="ensemble_rm.") as folder:
        yield Path(folder)


def _read(job: Job, trunk: Trunk, pairs: Preferences, folder: Path, part: str) -> PairStates:
    encoded = trunk.encoder.encode(pairs.samples())
    states = token_states(
        trunk, encoded, folder, max_bytes=job.states_limit, progress=job.named(part)
    )
    return PairStates(states, pairs)


def _first_heads(
    job: Job, branching: Branching, fit: PairStates, validation: PairStates
) -> HeadWeights:
    """Fit each member's head on the untouched blocks."""
    poolings = list(dict.fromkeys(view.pooling for view in job.views))
    features = [
        PairFeatures(
            _pooled(job, branching, side.states, poolings),
            side.pairs.targets,
            side.pairs.weights,
            side.pairs.margins,
            side.pairs.groups,
        )
        for side in (fit, validation)
    ]
    recipe = job.recipe
    return (
        HeadTrainer(
            features[0],
            features[1],
            view_of=[poolings.index(view.pooling) for view in job.views],
            recipe=Recipe(
                solver="adam",  # seeded, so that members start apart
                smoothing=recipe.smoothing,
                centring=recipe.centring,
                bootstrap=recipe.bootstrap,
            ),
            seeds=job.seeds,
            device=branching.trunk.device,
        )
        .run(progress=job.named("heads"))
        .weights
    )


@torch.inference_mode()
def _pooled(
    job: Job, branching: Branching, states: TokenStates, poolings: list[Pooling]
) -> NDArray[np.float32]:
    """Run the untouched blocks on token states: (n_samples, n_poolings, width or 2·width)."""
    trunk = branching.trunk
    width = trunk.width * (1 + ("both" in poolings))
    out = np.zeros((len(states), len(poolings), width), dtype=np.float32)
    done = 0
    for rows in plan([len(e.ids) for e in states.encoded], token_budget=job.options.token_budget):
        batch, given = states.batch(rows)
        for i, pooling in enumerate(poolings):
            pooled = branching.pooled(trunk.rest, given, batch, pooling, width=width)
            out[rows, i] = pooled.cpu().numpy()
        done += len(rows)
        job.progress("reading the top blocks", done, len(states))
    return out
