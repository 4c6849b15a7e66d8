"""`branch` members: one trunk, k trained copies of its top blocks, a head on each."""

from __future__ import annotations

import copy

from torch.nn import ModuleList

from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.branches.base import Branched, Tensors


class BranchScorer(Branched):
    """k branches over one trunk.

    Parameters
    ----------
    backbone : Backbone
    options : TrunkOptions
        How the trunk reads text: the same at training and at scoring.
    views : sequence of View
        How each branch's last states are pooled; the layer is the deepest.
    heads : HeadWeights
    tensors : sequence of dict
        Each branch's weights by name, ``"0.…"`` its lowest block's.
    blocks : int
        How many blocks each has.
    names : sequence of str, optional
        One a branch.
    branching : Branching, optional
        Over an open trunk, instead of one loaded at the first score.
    """

    kind = "branch"
    file = "branches.safetensors"

    def _kept(self, own: Tensors) -> Tensors:
        dtype = bb.torch_dtype(self.options.dtype)
        return {name: tensor.to(dtype) for name, tensor in own.items()}

    def _grow(self, trunk: Trunk) -> list[ModuleList]:
        """Pour the weights into copies of the trunk's upper blocks, and let those go."""
        found = []
        for tensors in self.tensors:
            branch = copy.deepcopy(trunk.rest)
            branch.load_state_dict(tensors)
            found.append(branch.eval().requires_grad_(requires_grad=False).to(trunk.device))
        trunk.forget_rest()
        return found
