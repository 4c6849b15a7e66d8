"""Training of `branch` members: token states, first heads, copies of the top blocks, a scorer.

`lora` members are trained in the same steps: what both share is here, too.
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
from ensemble_rm.progress import named

R = TypeVar("R", bound=BranchedRecipe)


@dataclass(frozen=True)
class BranchedRun(Generic[R]):
    """The trunk and the token states that branches or adapters are trained on.

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
        """Number of top blocks that each member has of its own."""
        assert self.job.recipe.blocks is not None  # the recipe is resolved
        return self.job.recipe.blocks


def train_branches(job: Job[BranchRecipe]) -> Trained:
    """Train k copies of the top blocks, each with a head, over one trunk."""
    with open_run(job) as run:
        heads, result = train_copies(run)
        scorer = BranchScorer(
            job.backbone,
            job.options,
            run.views,
            trained_heads(heads, result),
            [
                {name: tensor.cpu() for name, tensor in branch.blocks.state_dict().items()}
                for branch in result.branches
            ],
            blocks=run.blocks,
            branching=run.branching,
        )
        return finish(run, scorer, result)


def train_copies(run: BranchedRun[BranchRecipe]) -> tuple[HeadWeights, BranchesResult]:
    """Train copies of the blocks on token states; return the first heads and the result."""
    job = run.job
    if job.start:
        # Training on needs the earlier heads: branches and heads belong together.
        start = job.only_start(BranchScorer)
        own = [_continued(run, tensors) for tensors in start.tensors]
        return start.heads, fit_members(run, start.heads, own, checkpoint=job.checkpoint)
    blocks = [_trainable(run, seeds["init"]) for seeds in job.seeds]
    # Without fresh blocks all branches begin alike, so that one set of features serves all.
    alike = [run.branching.trunk.rest]
    heads = first_heads(run, blocks if job.recipe.reinitialise else alike)
    return heads, fit_members(run, heads, blocks, checkpoint=job.checkpoint)


def _trainable(run: BranchedRun[BranchRecipe], seed: int) -> torch.nn.ModuleList:
    """Copy the upper blocks as float32, the topmost with fresh weights if the recipe says so."""
    trunk, fresh = run.branching.trunk, run.job.recipe.reinitialise
    # float32 masters: small updates vanish in bfloat16.
    own = copy.deepcopy(trunk.rest).float().requires_grad_(requires_grad=True)
    if fresh:
        # Fresh weights differ by member, which is the point of drawing them.
        with global_seed(seed):
            initialise(trunk.model, list(own)[-fresh:])
    return own


def _continued(
    run: BranchedRun[BranchRecipe], tensors: Mapping[str, torch.Tensor]
) -> torch.nn.ModuleList:
    """Copy the upper blocks as float32, with the weights that a member continues from."""
    own = copy.deepcopy(run.branching.trunk.rest).float()
    own.load_state_dict(dict(tensors))
    return own.requires_grad_(requires_grad=True)


def initialise(model: Any, blocks: Sequence[torch.nn.Module]) -> None:
    """Draw a block's weights as its architecture initialises them, by torch's global generator."""
    for block in blocks:
        for tensor in [*block.parameters(), *block.buffers()]:
            vars(tensor)["_is_hf_initialized"] = False  # else transformers skips it
        for module in block.modules():
            model._init_weights(module)


@contextmanager
def open_run(job: Job[R]) -> Iterator[BranchedRun[R]]:
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
        # After the states were read: what is stored must not be noisy.
        set_dropout(trunk.rest, job.recipe.dropout)
        yield BranchedRun(job, branching, fit, validation)


def fit_members(
    run: BranchedRun[Any],
    heads: HeadWeights,
    blocks: Sequence[torch.nn.ModuleList],
    *,
    checkpoint: Path | None,
    penalty: Penalty | None = None,
) -> BranchesResult:
    """Train the heads, and the parameters of the blocks that require a gradient.

    Parameters
    ----------
    run : BranchedRun
    heads : HeadWeights
        The heads to start from.
    blocks : sequence of ModuleList
        One list per member.
    checkpoint : Path, optional
    penalty : callable, optional
        A term that each step minimises with the loss.
    """
    job = run.job
    trainer = BranchTrainer(
        run.branching,
        run.fit,
        run.validation,
        branches=[
            Branch(own, heads, i, view.pooling)
            for i, (own, view) in enumerate(zip(blocks, run.views, strict=False))
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
    """Return the heads with their trained weights."""
    return replace(
        heads,
        weight=np.stack([b.weight.detach().double().cpu().numpy() for b in result.branches]),
        bias=np.array([b.bias.item() for b in result.branches]),
    )


def finish(run: BranchedRun[Any], scorer: Scorer, result: BranchesResult) -> Trained:
    """Score the validation samples with the new members, and record how the run went."""
    record = {
        "validation_nll": list(result.validation_nll),
        "history": result.history,
        "token_states_bytes": run.fit.states.bytes,
    }
    # By the scorer that will serve, not by the training code: a difference would show here.
    reference = scorer.score(run.job.validation.samples())
    return Trained((scorer,), reference, count_truncation(run.fit.states.encoded), record)


@contextmanager
def _folder(job: Job[Any]) -> Iterator[Path]:
    """Return the cache folder, or a temporary one that is deleted after the run."""
    if job.cache_folder is not None:
        yield job.cache_folder
        return
    with tempfile.TemporaryDirectory(prefix="ensemble_rm.") as folder:
        yield Path(folder)


def _read(job: Job[Any], trunk: Trunk, pairs: Preferences, folder: Path, part: str) -> PairStates:
    encoded = trunk.encoder.encode(pairs.samples())
    states = token_states(
        trunk,
        encoded,
        folder,
        max_bytes=job.recipe.states_limit,
        progress=named(job.progress, part),
    )
    return PairStates(states, pairs)


def first_heads(run: BranchedRun[Any], blocks: Sequence[torch.nn.ModuleList]) -> HeadWeights:
    """Return each member's head to start from, for the blocks before training.

    Parameters
    ----------
    run : BranchedRun
    blocks : sequence of ModuleList
        One per member, or a single one that all members share.
    """
    job = run.job
    sources = [(i % len(blocks), view.pooling) for i, view in enumerate(run.views)]
    distinct = list(dict.fromkeys(sources))
    features = [
        PairFeatures(
            _pooled(run, blocks, side.states, distinct),
            side.pairs.targets,
            side.pairs.weights,
            side.pairs.margins,
            side.pairs.groups,
        )
        for side in (run.fit, run.validation)
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
        device=run.branching.trunk.device,
    )
    if recipe.first_head == "fitted":
        return trainer.run(progress=named(job.progress, "heads")).weights
    # Untrained heads still scale their features.
    return trainer.untrained()


@torch.inference_mode()
def _pooled(
    run: BranchedRun[Any],
    blocks: Sequence[torch.nn.ModuleList],
    states: TokenStates,
    sources: Sequence[tuple[int, Pooling]],
) -> NDArray[np.float32]:
    """Run blocks on token states, and pool: (n_samples, n_sources, width or 2·width)."""
    job, branching = run.job, run.branching
    dtype = bb.torch_dtype(job.options.dtype)
    own = [
        # The dtype in which branches will score.
        b if next(b.parameters()).dtype == dtype else copy.deepcopy(b).to(dtype).eval()
        for b in blocks
    ]
    # "both" needs twice the width; shorter poolings leave the rest 0.
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
