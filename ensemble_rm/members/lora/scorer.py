"""`lora` members: one trunk, k LoRA adapters on some or all of its blocks, with a head on each.

The backbone's weights are in memory once for all k members; a saved member is its adapter and head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.nn import ModuleList

from ensemble_rm.file_digests import FileCheck
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.backbone.trunk import Trunk, View
from ensemble_rm.members.branches.base import SHARED, Branched, Tensors
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.lora.adapters import merge_adapter, require_peft, with_adapter
from ensemble_rm.members.lora.recipe import LoraOptions
from ensemble_rm.saved_json import get


class LoraScorer(Branched):
    """k adapters over one backbone; see `Branched` for the other parameters.

    Parameters
    ----------
    blocks : int
        Number of top blocks that are adapted; the blocks below run once for all members.
    lora : LoraOptions
        Shape of the adapters.
    shared : dict, optional
        Weights of the adapter that is merged into the blocks before all others: the warm start.
    """

    kind = "lora"
    file = "adapters.safetensors"

    def __init__(
        self,
        backbone: bb.Backbone,
        options: TrunkOptions,
        views: Sequence[View],
        heads: HeadWeights,
        tensors: Sequence[Tensors],
        *,
        blocks: int,
        lora: LoraOptions,
        shared: Tensors | None = None,
        names: Sequence[str] | None = None,
        branching: Branching | None = None,
    ) -> None:
        super().__init__(
            backbone,
            options,
            views,
            heads,
            tensors,
            blocks=blocks,
            names=names,
            branching=branching,
        )
        self.lora, self.shared = lora, shared

    def _build_blocks(self, trunk: Trunk) -> list[ModuleList]:
        """Put each adapter around the trunk's upper blocks, whose weights all share."""
        base = trunk.rest
        if self.shared is not None:
            base = merge_adapter(base, self.lora, self.shared)
        members = [with_adapter(base, self.lora, tensors) for tensors in self.tensors]
        trunk.forget_rest()
        return members

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | {"lora": self.lora, "shared": self.shared}

    def _settings(self) -> dict[str, Any]:
        own = {"lora": asdict(self.lora), "warm_start": self.shared is not None}
        return super()._settings() | own

    def _weights(self) -> Tensors:
        shared = self.shared or {}
        return super()._weights() | {f"{SHARED}.{name}": v for name, v in shared.items()}

    @classmethod
    def _read(
        cls,
        folder: Path,
        saved: Mapping[str, Any],
        check: FileCheck,
        trust_remote_code: Sequence[str],
    ) -> dict[str, Any]:
        require_peft()
        stored = load_file(folder / cls.file)
        start = f"{SHARED}."
        shared = {k.removeprefix(start): v for k, v in stored.items() if k.startswith(start)}
        own = {"lora": get(saved, "lora", LoraOptions), "shared": shared or None}
        return super()._read(folder, saved, check, trust_remote_code) | own
