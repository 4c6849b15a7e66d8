"""`branch` members: one trunk, k trained copies of its top blocks, a head on each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from torch.nn import ModuleList

from ensemble_rm.members import backbone as bb
from ensemble_rm.members.branched import Branched, Tensors, read_stored
from ensemble_rm.members.branching import Branching
from ensemble_rm.members.head_weights import HeadWeights
from ensemble_rm.members.trunk import Trunk, TrunkOptions, View


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

    def __init__(
        self,
        backbone: bb.Backbone,
        options: TrunkOptions,
        views: Sequence[View],
        heads: HeadWeights,
        tensors: Sequence[Tensors],
        *,
        blocks: int,
        names: Sequence[str] | None = None,
        branching: Branching | None = None,
    ) -> None:
        dtype = bb.torch_dtype(options.dtype)
        own = [{k: v.to(dtype) for k, v in branch.items()} for branch in tensors]
        super().__init__(
            backbone, options, views, heads, own, blocks=blocks, names=names, branching=branching
        )

    def _grow(self, trunk: Trunk) -> list[ModuleList]:
        """Pour the weights into copies of the trunk's upper blocks, and let those go."""
        found = []
        for tensors in self.tensors:
            branch = copy.deepcopy(trunk.rest)
            branch.load_state_dict(tensors)
            found.append(branch.eval().requires_grad_(requires_grad=False).to(trunk.device))
        trunk.forget_rest()
        return found

    def with_options(self, options: TrunkOptions) -> BranchScorer:
        """Return the same branches over a trunk of other options, loaded at its first score."""
        return BranchScorer(
            self.backbone,
            options,
            self.views,
            self.heads,
            self.tensors,
            blocks=self.blocks,
            names=self.names,
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        backbone: str | Path | None = None,
        device: str | None = None,
        cache_dir: Path | None = bb.DEFAULT_CACHE,
    ) -> BranchScorer:
        """Read what `save` wrote.

        Parameters
        ----------
        folder : Path
        backbone : str or Path, optional
            Where the backbone lies now, if not where training found it.
        device : str, optional
            The best available where none is named.
        cache_dir : Path, optional
            For converted GGUF weights.

        Raises
        ------
        BackboneError
            If the backbone's weights are not those that the branches grew from.
        StorageError
            If the folder is incomplete.
        """
        found = read_stored(folder, cls.file, backbone=backbone, device=device, cache_dir=cache_dir)
        return cls(
            found.backbone,
            found.options,
            found.views,
            found.heads,
            found.tensors,
            blocks=found.said["blocks"],
            names=found.said["names"],
        )
