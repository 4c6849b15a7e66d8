"""`branch` members: token states, heads to start from, branches, a scorer.

`lora` members take the same way; what they share stands here too.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_rm.data.samples import Preferences
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.token_states import TokenStates, token_states
from ensemble_rm.members.backbone.trunk import Pooling, Trunk, View
from ensemble_rm.members.branches.gradient_training import BranchesResult, BranchTrainer, Penalty
from ensemble_rm.members.branches.module import Branch, PairStates
from ensemble_rm.members.branches.recipe import BranchedRecipe, BranchRecipe
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.branches.scorer import BranchScorer
from ensemble_rm.members.encoding import count_truncation
from ensemble_rm.members.forward.batching import plan
from ensemble_rm.members.heads.gradient_training import HeadTrainer
from ensemble_rm.members.heads.recipe import HeadRecipe
from ensemble_rm.members.heads.weights import HeadWeights, PairFeatures
from ensemble_rm.members.learning.dropout import set_dropout
from ensemble_rm.members.learning.job import Job, Trained
from ensemble_rm.members.learning.seeds import global_seed
from ensemble_rm.members.scorer import Scorer

R = TypeVar("R", bound=BranchedRecipe)


@dataclass(frozen=True)
class Ground(Generic[R]):
    """What branches and adapters grow from.

    Attributes
    ----------
    job : Job
    branching : Branching
    fit, validation : PairStates
    """

    job: Job[R]
    branching: Branching
    fit: PairStates
    validation: PairStates

    @property
    def views(self) -> list[View]:
        """How each member's last states are pooled."""
        return [View.parse(view) for view in self.job.recipe.views or ()]

    @property
    def blocks(self) -> int:
        """How many top blocks each member has of its own."""
        assert self.job.recipe.blocks is not None  # the recipe is resolved
        return self.job.recipe.blocks


def train_branches(job: Job[BranchRecipe]) -> Trained:
    """Train k copies of the top blocks, each with a head, over one trunk."""
    with ground(job) as found:
        heads, result = grow_branches(found)
        scorer = BranchScorer(
            job.backbone,
            job.options,
            found.views,
            trained_heads(heads, result),
            [
                {name: tensor.cpu() for name, tensor in branch.blocks.state_dict().items()}
                for branch in result.branches
            ],
            blocks=found.blocks,
            branching=found.branching,
        )
        return finish(found, scorer, result)


def grow_branches(found: Ground[BranchRecipe]) -> tuple[HeadWeights, BranchesResult]:
    """Train the members on token states: where their heads started, and what became of them."""
    job = found.job
    start = job.only_start(BranchScorer)
    if start is not None:
        own = [_continued(found, tensors) for tensors in start.tensors]
        return start.heads, fit_branches(found, start.heads, own, checkpoint=job.checkpoint)
    blocks = [_trainable(found, seeds["init"]) for seeds in job.seeds]
    alike = [found.branching.trunk.rest]
    heads = first_heads(found, blocks if job.recipe.reinitialise else alike)
    return heads, fit_branches(found, heads, blocks, checkpoint=job.checkpoint)


def _trainable(found: Ground[BranchRecipe], seed: int) -> torch.nn.ModuleList:
    """Copy the upper blocks as float32, the topmost of them with fresh weights where asked."""
    trunk, fresh = found.branching.trunk, found.job.recipe.reinitialise
    own = copy.deepcopy(trunk.rest).float().requires_grad_(requires_grad=True)
    if fresh:
        with global_seed(seed):
            initialise(trunk.model, list(own)[-fresh:])
    return own


def _continued(
    found: Ground[BranchRecipe], tensors: Mapping[str, torch.Tensor]
) -> torch.nn.ModuleList:
    """Copy the upper blocks as float32, with the weights that a member goes on from."""
    own = copy.deepcopy(found.branching.trunk.rest).float()
    own.load_state_dict(dict(tensors))
    return own.requires_grad_(requires_grad=True)


def initialise(model: Any, blocks: Sequence[torch.nn.Module]) -> None:
    """Give blocks the weights that their architecture starts from, by torch's global generator."""
    for block in blocks:
        for tensor in [*block.parameters(), *block.buffers()]:
            vars(tensor)["_is_hf_initialized"] = False  # transformers initialises none twice
        for module in block.modules():
            model._init_weights(module)


@contextmanager
def ground(job: Job[R]) -> Iterator[Ground[R]]:
    """Open the trunk, and run it over all pairs up to the blocks that differ."""
    depth, _ = bb.read_shape(job.backbone)
    assert job.recipe.blocks is not None  # the recipe is resolved
    trunk = Trunk(job.backbone, job.options, top=depth - job.recipe.blocks)
    branching = Branching(trunk)
    with _folder(job) as folder:
        fit, validation = (
            _read(job, trunk, pairs, folder, part)
            for pairs, part in ((job.fit, "fit"), (job.validation, "validation"))
        )
        set_dropout(trunk.rest, job.recipe.dropout)
        yield Ground(job, branching, fit, validation)


def fit_branches(
    found: Ground[Any],
    heads: HeadWeights,
    blocks: Sequence[torch.nn.ModuleList],
    *,
    checkpoint: Path | None,
    penalty: Penalty | None = None,
) -> BranchesResult:
    """Train what of the blocks requires a gradient, and the heads.

    Parameters
    ----------
    found : Ground
    heads : HeadWeights
        Where they start.
    blocks : sequence of ModuleList
        Each member's.
    checkpoint : Path, optional
    penalty : callable, optional
        A term that each step minimises with the loss.
    """
    job = found.job
    trainer = BranchTrainer(
        found.branching,
        found.fit,
        found.validation,
        branches=[
            Branch(own, heads, i, view.pooling)
            for i, (own, view) in enumerate(zip(blocks, found.views, strict=False))
        ],
        recipe=job.recipe,
        seeds=job.seeds,
        checkpoint=checkpoint,
        digest=job.digest,
        may_stay=job.recipe.first_head == "fitted" or bool(job.start),
        penalty=penalty,
    )
    return trainer.run(progress=job.progress)


def trained_heads(heads: HeadWeights, result: BranchesResult) -> HeadWeights:
    """Return the heads as training left them."""
    return replace(
        heads,
        weight=np.stack([b.weight.detach().double().cpu().numpy() for b in result.branches]),
        bias=np.array([b.bias.item() for b in result.branches]),
    )


def finish(found: Ground[Any], scorer: Scorer, result: BranchesResult) -> Trained:
    """Score the validation samples with the new members, and say how the run went."""
    record = {
        "validation_nll": list(result.validation_nll),
        "history": result.history,
        "token_states_bytes": found.fit.states.bytes,
    }
    reference = scorer.score(found.job.validation.samples())
    return Trained((scorer,), reference, count_truncation(found.fit.states.encoded), record)


@contextmanager
def _folder(job: Job[Any]) -> Iterator[Path]:
    """Keep token states in the cache, or in a folder of their own that goes with the run."""
    if job.cache_folder is not None:
        yield job.cache_folder
        return
    with tempfile.TemporaryDirectory(prefix="ensemble_rm.") as folder:
        yield Path(folder)


def _read(job: Job[Any], trunk: Trunk, pairs: Preferences, folder: Path, part: str) -> PairStates:
    encoded = trunk.encoder.encode(pairs.samples())
    states = token_states(
        trunk, encoded, folder, max_bytes=job.recipe.states_limit, progress=job.named(part)
    )
    return PairStates(states, pairs)


def first_heads(found: Ground[Any], blocks: Sequence[torch.nn.ModuleList]) -> HeadWeights:
    """Make each member's head for blocks as they are: its own, or those that all share."""
    job = found.job
    sources = [(i % len(blocks), view.pooling) for i, view in enumerate(found.views)]
    distinct = list(dict.fromkeys(sources))
    features = [
        PairFeatures(
            _pooled(found, blocks, side.states, distinct),
            side.pairs.targets,
            side.pairs.weights,
            side.pairs.margins,
            side.pairs.groups,
        )
        for side in (found.fit, found.validation)
    ]
    recipe = job.recipe
    trainer = HeadTrainer(
        features[0],
        features[1],
        view_of=[distinct.index(source) for source in sources],
        recipe=HeadRecipe(
            solver="adam",  # seeded, so that members start apart
            smoothing=recipe.smoothing,
            centring=recipe.centring,
            bootstrap=recipe.bootstrap,
            subspace=recipe.subspace,
        ),
        seeds=job.seeds,
        device=found.branching.trunk.device,
    )
    if recipe.first_head == "fitted":
        return trainer.run(progress=job.named("heads")).weights
    return trainer.untrained()


@torch.inference_mode()
def _pooled(
    found: Ground[Any],
    blocks: Sequence[torch.nn.ModuleList],
    states: TokenStates,
    sources: Sequence[tuple[int, Pooling]],
) -> NDArray[np.float32]:
    """Run blocks on token states, and pool: (n_samples, n_sources, width or 2·width)."""
    job, branching = found.job, found.branching
    dtype = bb.torch_dtype(job.options.dtype)
    own = [
        each if next(each.parameters()).dtype == dtype else copy.deepcopy(each).to(dtype).eval()
        for each in blocks
    ]
    width = branching.trunk.width * (1 + any(pooling == "both" for _, pooling in sources))
    out = np.zeros((len(states), len(sources), width), dtype=np.float32)
    done = 0
    for rows in plan(states.lengths.tolist(), token_budget=branching.trunk.token_budget):
        batch, given = states.batch(rows)
        for i, (source, pooling) in enumerate(sources):
            pooled = branching.pooled(own[source], given, batch, pooling, width=width)
            out[rows, i] = pooled.cpu().numpy()
        done += len(rows)
        job.progress("reading the top blocks", done, len(states))
    return out
