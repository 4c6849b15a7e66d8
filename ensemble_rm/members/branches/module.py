"""A branch as a trainable module, and the token states that it is trained on.

Only parameters that require a gradient are trained, saved and restored: all of a branch's blocks,
or an adapter on them. Members may share the frozen ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.func import functional_call

from ensemble_rm.data.samples import Preferences
from ensemble_rm.members.backbone.checkpoint import torch_dtype
from ensemble_rm.members.backbone.token_states import TokenStates
from ensemble_rm.members.backbone.trunk import Pooling
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.heads.weights import HeadWeights


@dataclass(frozen=True)
class PairStates:
    """Token states of preference pairs, with the pairs.

    Attributes
    ----------
    states : TokenStates
        Of 2·n_pairs samples: every chosen one, then every rejected one.
    pairs : Preferences
    """

    states: TokenStates
    pairs: Preferences

    def __len__(self) -> int:
        return len(self.pairs)


class _Run(torch.nn.Module):
    """Passes blocks to a function, so that `functional_call` can replace their parameters."""

    def __init__(self, blocks: torch.nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, run: Callable[[torch.nn.ModuleList], torch.Tensor]) -> torch.Tensor:
        """Call the function with the blocks."""
        return run(self.blocks)


class Branch(torch.nn.Module):
    """A trainable member: its blocks and its linear head.

    Parameters
    ----------
    blocks : ModuleList
        Trainable parameters are float32 and require a gradient.
    head : HeadWeights
    member : int
        Row of `head`.
    pooling : {"last", "mean", "both"}
    """

    def __init__(
        self, blocks: torch.nn.ModuleList, head: HeadWeights, member: int, pooling: Pooling
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.pooling: Pooling = pooling
        for name in ("offset", "gain"):
            value = torch.from_numpy(getattr(head, name)[member]).float()
            self.register_buffer(name, value, persistent=False)
        self.weight = torch.nn.Parameter(torch.from_numpy(head.weight[member]).float())
        self.bias = torch.nn.Parameter(torch.tensor(float(head.bias[member])))

    def scores(
        self, branching: Branching, states: TokenStates, rows: Sequence[int]
    ) -> torch.Tensor:
        """Score the samples in `rows`: (B,)."""
        batch, given = states.batch(rows)
        dtype = torch_dtype(branching.trunk.options.dtype)

        def run(blocks: torch.nn.ModuleList) -> torch.Tensor:
            return branching.pooled(blocks, given, batch, self.pooling, width=len(self.weight))

        # The optimiser steps float32 weights; each pass runs a copy in the trunk's dtype.
        cast = {f"blocks.{name}": p.to(dtype) for name, p in self.blocks.named_parameters()}
        pooled: torch.Tensor = functional_call(_Run(self.blocks), cast, (run,))
        offset, gain = self.get_buffer("offset"), self.get_buffer("gain")
        return (pooled - offset) * gain @ self.weight + self.bias

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
