"""Several fine-tuned members of one start → one member whose weights are their mean.

Models that were fine-tuned from the same weights lie in one basin, so that the mean of their
weights is a model too, at a single model's price [1]_. Means are taken in float64.

References
----------
.. [1] Ramé et al. 2024 (WARM), arXiv 2401.12187: φ = (1/M) Σ φᵢ.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ensemble_rm.errors import MergeError
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.branches.scorer import BranchScorer
from ensemble_rm.members.full.scorer import FullScorer
from ensemble_rm.members.heads.weights import HeadWeights

NAME = "merged"


def average_tensors(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of tensors of one shape, in their own dtype.

    Raises
    ------
    MergeError
        If the shapes differ, or whole numbers do.
    """
    first = tensors[0]
    _same(f"shape of {name}", [tuple(tensor.shape) for tensor in tensors])
    if not first.is_floating_point():
        if any(not torch.equal(first, tensor) for tensor in tensors):
            raise MergeError(f"the members' whole numbers {name!r} differ; they have no mean")
        return first
    total = torch.stack([tensor.double() for tensor in tensors]).mean(0)
    return total.to(first.dtype)


def average_branches(scorers: Sequence[BranchScorer]) -> BranchScorer:
    """Return one branch: the mean of all branches' blocks and of their heads.

    Raises
    ------
    MergeError
        If there is only one branch, or they grew from other weights, are read in other ways, or
        standardise what they read by other numbers.
    """
    first = scorers[0]
    _same("backbone", [scorer.backbone.digest for scorer in scorers])
    _same("number of blocks", [scorer.blocks for scorer in scorers])
    _same("way to read text", [replace(scorer.options, device=None) for scorer in scorers])
    _same("view", [view for scorer in scorers for view in scorer.views])
    branches = [branch for scorer in scorers for branch in scorer.tensors]
    _require_two(len(branches))
    heads: dict[str, Any] = {}
    for name in first.heads.tensors():
        stacked = np.concatenate([scorer.heads.tensors()[name] for scorer in scorers])
        if name in ("offset", "gain") and (stacked != stacked[:1]).any():
            raise MergeError(
                f"the heads standardise what they read by other numbers ({name}), so that their "
                "weights have other units; train the branches in one run, without bootstrap"
            )
        heads[name] = stacked.mean(axis=0, keepdims=True)
    tensors = {name: average_tensors(name, [b[name] for b in branches]) for name in branches[0]}
    return BranchScorer(
        first.backbone,
        first.options,
        first.views[:1],
        HeadWeights(**heads),
        [tensors],
        blocks=first.blocks,
        names=[NAME],
    )


def average_classifiers(scorers: Sequence[FullScorer], folder: Path) -> FullScorer:
    """Write a model whose weights are the mean of full members', and open it.

    Parameters
    ----------
    scorers : sequence of FullScorer
        That were trained here.
    folder : Path
        Of the new model; must not exist.

    Raises
    ------
    MergeError
        If there is only one, one was not trained here, or they started from other weights, are
        read in other ways, or hold other weights.
    """
    first = scorers[0]
    _require_two(len(scorers))
    for scorer in scorers:
        if not scorer.own or scorer.start is None:
            raise MergeError(
                f"member {scorer.names[0]!r} does not say which weights its training started from; "
                "the mean of unrelated models is no model: merge members of one run of kind 'full'"
            )
    _same("starting checkpoint", [scorer.start for scorer in scorers])
    _same("pooling", [scorer.pooling for scorer in scorers])
    _same("way to read text", [replace(scorer.options, device=None) for scorer in scorers])
    sources = [scorer.backbone.folder for scorer in scorers]
    files = [sorted(file.name for file in source.glob("*.safetensors")) for source in sources]
    _same("weight files", files)
    shutil.copytree(sources[0], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in files[0]:
        _average_files([source / file for source in sources], folder / file)
    model = bb.Backbone(str(folder), folder, bb.weights_digest(folder))
    return FullScorer(
        model, first.options, name=NAME, pooling=first.pooling, own=True, start=first.start
    )


def _average_files(sources: Sequence[Path], target: Path) -> None:
    """Average safetensors files tensor by tensor, so that no two models are in memory."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(source, framework="pt")) for source in sources]
        _same(f"weights in {target.name}", [sorted(one.keys()) for one in opened])
        found = {
            name: average_tensors(name, [one.get_tensor(name) for one in opened])
            for name in sorted(opened[0].keys())
        }
        save_file(found, target, metadata=opened[0].metadata())


def _require_two(members: int) -> None:
    if members < 2:
        raise MergeError("there is one member; its mean is itself")


def _same(what: str, values: Iterable[Any]) -> None:
    first, *others = values
    odd = next((value for value in others if value != first), None)
    if odd is not None:
        raise MergeError(f"the members differ in their {what}: {str(first)[:60]}, {str(odd)[:60]}")
