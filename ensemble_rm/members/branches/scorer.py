"""`branch` members: one trunk, k trained copies of its top blocks, with a head on each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch.nn import ModuleList

from ensemble_rm.errors import ModelError
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.branches.base import Branched, Tensors
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.learning.averaging import (
    NAME,
    average_tensors,
    require_same,
    require_two,
)


class BranchScorer(Branched):
    """k branches over one trunk; see `Branched` for the parameters."""

    kind = "branch"
    file = "branches.safetensors"

    def _kept(self, own: Tensors) -> Tensors:
        dtype = bb.torch_dtype(self.options.dtype)
        return {name: tensor.to(dtype) for name, tensor in own.items()}

    def _build_blocks(self, trunk: Trunk) -> list[ModuleList]:
        """Load the weights into copies of the trunk's upper blocks, and free those."""
        members = []
        for tensors in self.tensors:
            branch = copy.deepcopy(trunk.rest)
            branch.load_state_dict(tensors)
            members.append(branch.eval().requires_grad_(requires_grad=False).to(trunk.device))
        trunk.forget_rest()
        return members

    @classmethod
    def average(cls, scorers: Sequence[Self], folder: Path | None) -> Self:  # noqa: ARG003
        """Return one branch: the mean of all branches' blocks and of their heads.

        Raises
        ------
        ModelError
            If there is only one branch, or they were trained from other weights, are read in other
            ways, or standardise the pooled states by other numbers.
        """
        first = scorers[0]
        require_same("backbone", [scorer.backbone.digest for scorer in scorers])
        require_same("number of blocks", [scorer.blocks for scorer in scorers])
        require_same("way to read text", [replace(s.options, device=None) for s in scorers])
        require_same("view", [view for scorer in scorers for view in scorer.views])
        branches = [branch for scorer in scorers for branch in scorer.tensors]
        require_two(len(branches))
        heads: dict[str, Any] = {}
        for name in first.heads.tensors():
            stacked = np.concatenate([scorer.heads.tensors()[name] for scorer in scorers])
            if name in ("offset", "gain") and (stacked != stacked[:1]).any():
                raise ModelError(
                    f"the heads standardise the pooled states by other numbers ({name}), so that "
                    "their weights have other units; train the branches in one run, without "
                    "bootstrap"
                )
            heads[name] = stacked.mean(axis=0, keepdims=True)
        tensors = {name: average_tensors(name, [b[name] for b in branches]) for name in branches[0]}
        return cls(
            first.backbone,
            first.options,
            first.views[:1],
            HeadWeights(**heads),
            [tensors],
            blocks=first.blocks,
            names=[NAME],
        )
