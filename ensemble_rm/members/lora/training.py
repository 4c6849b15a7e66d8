"""Training of `lora` members: k adapters over one backbone, as branches with frozen blocks.

With a warm start, one adapter is fitted first and merged into the blocks, and the members' adapters
start from there [1]_.

References
----------
.. [1] Zhang et al. 2024, arXiv 2401.16635: LoRA ensembles do better from a backbone that was
   fine-tuned on the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import ModuleList

from ensemble_rm.errors import OptionError
from ensemble_rm.members.branches.base import Tensors
from ensemble_rm.members.branches.gradient_training import BranchesResult, Penalty
from ensemble_rm.members.branches.module import Branch
from ensemble_rm.members.branches.training import (
    BranchedRun,
    finish,
    first_heads,
    fit_members,
    open_run,
    trained_heads,
)
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.learning.checkpoint import load_checkpoint, save_checkpoint
from ensemble_rm.members.learning.job import Job, Trained
from ensemble_rm.members.learning.seeds import global_seed, member_seeds
from ensemble_rm.members.lora.adapters import (
    adapt,
    factors,
    merge_adapter,
    own_parameters,
    own_tensors,
    require_peft,
    with_adapter,
)
from ensemble_rm.members.lora.diversity import alikeness
from ensemble_rm.members.lora.recipe import LoraOptions, LoraRecipe
from ensemble_rm.members.lora.scorer import LoraScorer
from ensemble_rm.progress import named


def train_lora(job: Job[LoraRecipe]) -> Trained:
    """Train k adapters, each with a head, over one backbone.

    Raises
    ------
    MissingExtraError
        If peft is not installed.
    OptionError
        If a target names no linear layer, or `diversity` is set for a single member.
    """
    if job.recipe.diversity > 0 and len(job.seeds) == 1:
        raise OptionError(
            f"diversity={job.recipe.diversity} needs at least 2 members, not 1; train more members "
            "or set diversity=0"
        )
    require_peft()
    with open_run(job) as run:
        heads, result, shared = train_adapters(run)
        scorer = LoraScorer(
            job.backbone,
            job.options,
            run.views,
            trained_heads(heads, result),
            [_on_cpu(own_tensors(branch.blocks)) for branch in result.branches],
            blocks=run.blocks,
            lora=job.recipe.adapter,
            shared=shared,
            branching=run.branching,
        )
        return finish(run, scorer, result)


def train_adapters(
    run: BranchedRun[LoraRecipe],
) -> tuple[HeadWeights, BranchesResult, Tensors | None]:
    """Train adapters on token states; return the first heads, the result and the shared adapter."""
    job, blocks = run.job, run.branching.trunk.rest
    lora, diversity = job.recipe.adapter, _diversity(job.recipe.diversity)
    if job.start:
        start = job.only_start(LoraScorer)
        if start.shared is not None:
            blocks = merge_adapter(blocks, lora, start.shared)
        own = [_continued(blocks, lora, tensors) for tensors in start.tensors]
        result = fit_members(run, start.heads, own, checkpoint=job.checkpoint, penalty=diversity)
        return start.heads, result, start.shared
    shared = _shared(run) if job.recipe.warm_start else None
    if shared is not None:
        blocks = merge_adapter(blocks, lora, shared)
    heads = first_heads(run, [blocks])
    own = [_adapted(blocks, lora, seeds["init"]) for seeds in job.seeds]
    result = fit_members(run, heads, own, checkpoint=job.checkpoint, penalty=diversity)
    return heads, result, shared


def _diversity(coefficient: float) -> Penalty | None:
    """Return the term that keeps adapters apart; adapters of stopped members are constants."""
    if coefficient == 0:
        return None

    def penalty(branches: Sequence[Branch], active: Sequence[int]) -> torch.Tensor:
        members = [factors(branch.blocks) for branch in branches]
        for i in set(range(len(branches))) - set(active):
            members[i] = [(a.detach(), b.detach()) for a, b in members[i]]
        return coefficient * alikeness(members)

    return penalty


def _adapted(blocks: ModuleList, lora: LoraOptions, seed: int) -> ModuleList:
    with global_seed(seed):
        return adapt(blocks, lora)


def _continued(blocks: ModuleList, lora: LoraOptions, tensors: Tensors) -> ModuleList:
    """Return the blocks with a trainable adapter that has a member's weights."""
    own = with_adapter(blocks, lora, tensors).train()
    for p in own_parameters(own):
        p.requires_grad = True
    return own


def _on_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _shared(run: BranchedRun[LoraRecipe]) -> Tensors:
    """Fit the adapter that all members start from, or read it if a killed run has fitted it."""
    job, blocks = run.job, run.branching.trunk.rest
    folder = None if job.checkpoint is None else job.checkpoint / "shared"
    done = None if folder is None else folder / "done"
    stored = None if done is None else load_checkpoint(done, recipe=job.digest)
    if stored is not None:
        return stored[0]
    seeds = member_seeds(job.seeds[0]["init"], 1)  # independent of all members' streams
    alone = replace(
        run,
        job=replace(
            job,
            seeds=seeds,
            recipe=replace(job.recipe, views=(job.recipe.views or ())[:1]),
            progress=named(job.progress, "shared adapter"),
        ),
    )
    result = fit_members(
        alone,
        first_heads(alone, [blocks]),
        [_adapted(blocks, job.recipe.adapter, seeds[0]["init"])],
        checkpoint=folder,
    )
    tensors = _on_cpu(own_tensors(result.branches[0].blocks))
    if done is not None:
        save_checkpoint(done, tensors, {"recipe": job.digest})
    return tensors
