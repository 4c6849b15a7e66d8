"""What `branch` and `lora` members have in common: one trunk, k versions of its top blocks.

The trunk runs once per sample, up to the blocks that differ. Each member runs its own blocks from
there, and its head reads their last states. How a kind makes its blocks is in `_build_blocks`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import ModuleList

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import OptionError, StorageError
from ensemble_rm.file_digests import FileCheck
from ensemble_rm.file_modes import follow_umask
from ensemble_rm.members.backbone import checkpoint as bb
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.backbone.trunk import Trunk, View
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.digest import member_digest
from ensemble_rm.members.encoding import count_truncation
from ensemble_rm.members.forward.prefix_cache import Prefix
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.model_scorer import ModelScorer, in_turn
from ensemble_rm.members.scorer import MemberScores
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import get

Tensors = dict[str, torch.Tensor]
SHARED = "shared"  # prefix of the names of weights that all members use


class Branched(ModelScorer):
    """k versions of a trunk's top blocks, with a head on each; a kind adds `_build_blocks`.

    Parameters
    ----------
    backbone : Backbone
    options : TrunkOptions
        How the trunk reads text; the same in training and in scoring.
    views : sequence of View
        How each member's last states are pooled; the layer is the deepest.
    heads : HeadWeights
    tensors : sequence of dict
        Each member's own weights by name; names of the lowest block start with ``"0."``.
    blocks : int
        Number of blocks that each member has.
    names : sequence of str, optional
        One per member; numbered by default.
    branching : Branching, optional
        Over an open trunk; by default one is loaded at the first score.
    """

    file: str

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
        if not len(views) == len(heads.bias) == len(tensors):
            raise OptionError(
                f"{len(views)} views, {len(heads.bias)} heads and {len(tensors)} members' weights"
            )
        numbered = [f"{self.kind}{i}" for i in range(len(views))]
        super().__init__(backbone, options, names or numbered)
        self.views, self.heads, self.blocks = tuple(views), heads, blocks
        self.tensors = [self._kept(own) for own in tensors]
        self._branching = branching
        self._members: list[ModuleList] = []

    def _kept(self, own: Tensors) -> Tensors:
        """Return a member's weights in the dtype in which they are saved."""
        return own

    @abstractmethod
    def _build_blocks(self, trunk: Trunk) -> list[ModuleList]:
        """Return every member's blocks; RuntimeError if the weights do not fit the trunk's."""

    def _open(self) -> tuple[Branching, list[ModuleList]]:
        """Load the trunk and make the members' blocks at first use."""
        with self._lock:
            if self._branching is None:
                top = self.views[0].layer - self.blocks
                self._branching = Branching(Trunk(self.backbone, self.options, top=top))
            if not self._members:
                try:
                    self._members = self._build_blocks(self._branching.trunk)
                except RuntimeError as error:
                    raise StorageError(
                        f"the {self.kind} members do not fit the backbone: {error}"
                    ) from error
            return self._branching, self._members

    def _drop_model(self) -> None:
        self._branching, self._members = None, []

    @in_turn
    @torch.inference_mode()
    def score_detailed(
        self,
        samples: Sequence[Sample],
        *,
        features: bool = False,  # noqa: ARG002 - these members have none
        progress: Progress = silent,
    ) -> MemberScores:
        """Return the scores and which samples were cut."""
        branching, members = self._open()
        trunk = branching.trunk
        encoded = trunk.encoder.encode(samples)
        out = np.empty((len(encoded), len(members)))
        done, width = 0, self.heads.offset.shape[1]
        prompts: tuple[Prefix | None, list[Prefix]] = (
            None,
            [],
        )  # the last prefix: the trunk's, and as each member reads it
        for batch in branching.passes(encoded, members[0]):
            states = branching.states(batch)
            if batch.prefix is not None and batch.prefix is not prompts[0]:
                read = [branching.read_prefix(blocks, batch.prefix) for blocks in members]
                prompts = (batch.prefix, read)
            for i, (blocks, view) in enumerate(zip(members, self.views, strict=True)):
                own = batch if batch.prefix is None else replace(batch, prefix=prompts[1][i])
                pooled = branching.pooled(blocks, states, own, view.pooling, width=width)
                out[batch.rows, i] = self.heads(i, pooled.cpu().numpy())
            done += len(batch.rows)
            progress("scoring", done, len(encoded))
        return MemberScores(out, count_truncation(encoded))

    @cached_property
    def digest(self) -> str:
        """Equal where the scores of equal samples are."""
        settings = {name: value for name, value in self._settings().items() if name != "names"}
        weights = self.heads.tensors() | self._weights()
        return member_digest(self.kind, self.backbone, self.options, settings, weights)

    def _parts(self) -> dict[str, Any]:
        return {
            "views": self.views,
            "heads": self.heads,
            "tensors": self.tensors,
            "blocks": self.blocks,
            "names": self.names,
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "views": [str(view) for view in self.views],
            "blocks": self.blocks,
            "names": list(self.names),
        }

    def _weights(self) -> Tensors:
        """Return all weights of the members, by name."""
        return {f"{i}.{k}": v for i, own in enumerate(self.tensors) for k, v in own.items()}

    def _write(self, folder: Path) -> dict[str, Any]:
        self.heads.save(folder)
        flat = {name: tensor.cpu().contiguous() for name, tensor in self._weights().items()}
        save_file(flat, folder / self.file)
        follow_umask(folder / self.file)
        return {}

    @classmethod
    def _read(
        cls,
        folder: Path,
        saved: Mapping[str, Any],
        check: FileCheck,  # noqa: ARG003 - no other model
        trust_remote_code: Sequence[str],  # noqa: ARG003 - no other model
    ) -> dict[str, Any]:
        views = [View.parse(view) for view in get(saved, "views", tuple[str, ...])]
        tensors: list[Tensors] = [{} for _ in views]
        for name, tensor in load_file(folder / cls.file).items():
            member, _, rest = name.partition(".")
            if member != SHARED:
                tensors[int(member)][rest] = tensor
        return {
            "views": views,
            "heads": HeadWeights.load(folder),
            "tensors": tensors,
            "blocks": get(saved, "blocks", int),
            "names": get(saved, "names", tuple[str, ...]),
        }
