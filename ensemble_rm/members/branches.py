"""`branch` members: one trunk, k trained copies of its top blocks, a head on each.

The trunk runs once a sample up to the blocks that differ; each branch runs its own from there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from ensemble_rm.errors import OptionError, StorageError
from ensemble_rm.members import backbone as bb
from ensemble_rm.members.branching import Branching
from ensemble_rm.members.head_weights import HeadWeights
from ensemble_rm.members.identity import member_digest
from ensemble_rm.members.prefix import Prefix
from ensemble_rm.members.text import Truncation, count_truncation
from ensemble_rm.members.trunk import Progress, Trunk, TrunkOptions, View, silent
from ensemble_rm.samples import Sample


class BranchScorer:
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

    def __init__(
        self,
        backbone: bb.Backbone,
        options: TrunkOptions,
        views: Sequence[View],
        heads: HeadWeights,
        tensors: Sequence[dict[str, torch.Tensor]],
        *,
        blocks: int,
        names: Sequence[str] | None = None,
        branching: Branching | None = None,
    ) -> None:
        if not len(views) == len(heads.bias) == len(tensors):
            raise OptionError(
                f"{len(views)} views, {len(heads.bias)} heads and {len(tensors)} branches"
            )
        self.backbone, self.options = backbone, options
        self.views, self.heads, self.blocks = tuple(views), heads, blocks
        dtype = bb.torch_dtype(options.dtype)
        self.tensors = [{k: v.to(dtype) for k, v in branch.items()} for branch in tensors]
        self.names = tuple(names) if names else tuple(f"branch{i}" for i in range(len(self.views)))
        self._branching = branching
        self._branches: list[torch.nn.ModuleList] = []
        self._lock = Lock()

    def _open(self) -> tuple[Branching, list[torch.nn.ModuleList]]:
        """Load the trunk at first use, and pour the weights into copies of its upper blocks."""
        with self._lock:
            if not self._branches:
                if self._branching is None:
                    top = self.views[0].layer - self.blocks
                    self._branching = Branching(Trunk(self.backbone, self.options, top=top))
                trunk = self._branching.trunk
                try:
                    found = [_pour(trunk.rest, tensors) for tensors in self.tensors]
                except RuntimeError as error:
                    raise StorageError(f"the branches do not fit the backbone: {error}") from error
                trunk.forget_rest()
                self._branches = [branch.to(trunk.device) for branch in found]
            return self._branching, self._branches  # type: ignore[return-value]

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, k) raw scores, in the order of the samples."""
        return self.score_counted(samples)[0]

    @torch.inference_mode()
    def score_counted(
        self, samples: Sequence[Sample], *, progress: Progress = silent
    ) -> tuple[NDArray[np.float64], Truncation]:
        """Return the scores, and how many samples were cut."""
        branching, branches = self._open()
        trunk = branching.trunk
        encoded = trunk.encoder.encode(samples)
        out = np.empty((len(encoded), len(branches)))
        done, width = 0, self.heads.offset.shape[1]
        prompts: tuple[Prefix | None, list[Prefix]] = (None, [])  # the trunk's, and each branch's
        for batch in trunk.passes(encoded, states=True):
            states = trunk.states(batch)
            if batch.prefix is not None and batch.prefix is not prompts[0]:
                read = [branching.read_prefix(blocks, batch.prefix) for blocks in branches]
                prompts = (batch.prefix, read)
            for i, (blocks, view) in enumerate(zip(branches, self.views, strict=True)):
                own = batch if batch.prefix is None else replace(batch, prefix=prompts[1][i])
                pooled = branching.pooled(blocks, states, own, view.pooling, width=width)
                out[batch.rows, i] = self.heads(i, pooled.cpu().numpy())
            done += len(batch.rows)
            progress("scoring", done, len(encoded))
        return out, count_truncation(encoded)

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

    @cached_property
    def digest(self) -> str:
        """Equal where the scores of equal samples are."""
        said = {"views": [str(view) for view in self.views], "blocks": self.blocks}
        branches = {f"{i}.{k}": v for i, own in enumerate(self.tensors) for k, v in own.items()}
        weights = self.heads.tensors() | branches
        return member_digest(self.kind, self.backbone, self.options, said, weights)

    def describe(self) -> dict[str, Any]:
        """Return what provenance and reports say of it."""
        return {
            "kind": self.kind,
            "backbone": self.backbone.name,
            "digest": self.backbone.digest,
            "options": asdict(self.options),
            "views": [str(view) for view in self.views],
            "blocks": self.blocks,
            "names": list(self.names),
        }

    def save(self, folder: Path) -> None:
        """Write ``member.json``, ``heads.safetensors`` and ``branches.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        heads = {k: np.ascontiguousarray(v) for k, v in self.heads.tensors().items()}
        save_arrays(heads, folder / "heads.safetensors")
        flat = {
            f"{i}.{name}": tensor.cpu().contiguous()
            for i, branch in enumerate(self.tensors)
            for name, tensor in branch.items()
        }
        save_file(flat, folder / "branches.safetensors")
        (folder / "member.json").write_text(json.dumps(self.describe(), indent=1) + "\n")

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
        try:
            said = json.loads((folder / "member.json").read_text())
            heads = HeadWeights(**load_arrays(folder / "heads.safetensors"))
            views = [View.parse(view) for view in said["views"]]
            options = replace(TrunkOptions(**said["options"]), device=device)
            tensors: list[dict[str, torch.Tensor]] = [{} for _ in views]
            for name, tensor in load_file(folder / "branches.safetensors").items():
                member, _, rest = name.partition(".")
                tensors[int(member)][rest] = tensor
            blocks, names = int(said["blocks"]), said["names"]
        except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
            raise StorageError(f"{folder} is no saved branch member: {error}") from error
        found = bb.locate_same(backbone or said["backbone"], said["digest"], cache_dir=cache_dir)
        return cls(found, options, views, heads, tensors, blocks=blocks, names=names)


def _pour(blocks: torch.nn.ModuleList, tensors: dict[str, torch.Tensor]) -> torch.nn.ModuleList:
    """Return a copy of blocks with other weights."""
    branch = copy.deepcopy(blocks)
    branch.load_state_dict(tensors)
    return branch.eval().requires_grad_(requires_grad=False)
