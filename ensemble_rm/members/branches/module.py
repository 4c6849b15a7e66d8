"""A branch in training, and what it is trained on.

What is trained of a member's blocks, its whole copy or an adapter on them, is what requires a
gradient: a frozen parameter is neither saved nor restored, and members may share it.
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
    """Token states and verdicts of preference pairs.

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
    """Hands blocks to a function, so that `functional_call` can give them other parameters."""

    def __init__(self, blocks: torch.nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, run: Callable[[torch.nn.ModuleList], torch.Tensor]) -> torch.Tensor:
        """Run them."""
        return run(self.blocks)


class Branch(torch.nn.Module):
    """A member in training: its blocks, and its linear head.

    Parameters
    ----------
    blocks : ModuleList
        Its own; what is to be trained in them is float32 and requires a gradient.
    head : HeadWeights
    member : int
        Which of the heads.
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
        """Score some samples, (B,): its blocks in the trunk's dtype, cast at each pass."""
        batch, given = states.batch(rows)
        dtype = torch_dtype(branching.trunk.options.dtype)

        def run(blocks: torch.nn.ModuleList) -> torch.Tensor:
            return branching.pooled(blocks, given, batch, self.pooling, width=len(self.weight))

        cast = {f"blocks.{name}": p.to(dtype) for name, p in self.blocks.named_parameters()}
        pooled: torch.Tensor = functional_call(_Run(self.blocks), cast, (run,))
        offset, gain = self.get_buffer("offset"), self.get_buffer("gain")
        return (pooled - offset) * gain @ self.weight + self.bias

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Return what is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
