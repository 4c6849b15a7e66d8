"""Copies of a trunk's top blocks, run on token states that the trunk made once.

The model's own forward pass drives them, so that masks, positions and the final norm are its own:
each lower block is replaced by one that computes nothing, the last of these by the states. Knows
nothing of heads, losses or files.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ensemble_rm.errors import BackboneError, OptionError
from ensemble_rm.members.batching import Batch
from ensemble_rm.members.pooling import Pooling, Rule, pool
from ensemble_rm.members.prefix import Prefix
from ensemble_rm.members.trunk import Trunk, View, find_blocks


class _StandIn(torch.nn.Module):
    """In a block's place: passes on the states that it was made with, or those it is given."""

    def __init__(
        self, block: torch.nn.Module, *, in_tuple: bool, states: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that its weights are not registered here
        self._in_tuple = in_tuple
        self._states = states

    def __getattr__(self, name: str) -> Any:
        """Answer for the block, such as for the kind of attention that it wants."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """Return states as the block would return them."""
        out = states if self._states is None else self._states
        return (out, None) if self._in_tuple else out


def _copy_down_to(model: torch.nn.Module, path: Sequence[str]) -> list[torch.nn.Module]:
    """Copy a model and its children along `path`; everything else, the weights too, is shared."""
    chain: list[torch.nn.Module] = []
    for name in [None, *path]:
        module = model if name is None else getattr(chain[-1], name)
        own = copy.copy(module)
        own._modules = dict(module._modules)
        if name is not None:
            chain[-1]._modules[name] = own
        chain.append(own)
    return chain


class Branching:
    """Runs copies of the blocks above `trunk.top`.

    Parameters
    ----------
    trunk : Trunk
        Up to the last block that all branches share; at least one block above it.

    Raises
    ------
    OptionError
        If no block is left above the trunk.
    """

    def __init__(self, trunk: Trunk) -> None:
        if trunk.top >= trunk.depth:
            raise OptionError(f"the trunk holds all {trunk.depth} blocks; none is left to branch")
        self.trunk = trunk
        parent, self._name, _ = find_blocks(trunk.model, depth=trunk.top)
        path = next(name for name, module in trunk.model.named_modules() if module is parent)
        self._path = path.split(".") if path else []
        self._in_tuple = self._returns_tuple()

    @torch.inference_mode()
    def _returns_tuple(self) -> bool:
        """Ask the trunk's last block on one token."""
        seen: list[Any] = []
        hook = self.trunk.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
        one = torch.ones(1, 1, dtype=torch.int64, device=self.trunk.device)
        try:
            self.trunk.model(input_ids=one, attention_mask=one)
        finally:
            hook.remove()
        if not isinstance(seen[0], torch.Tensor | tuple):
            raise BackboneError(f"a block of {type(self.trunk.model).__name__} returns no states")
        return isinstance(seen[0], tuple)

    def _driver(self, blocks: torch.nn.ModuleList, states: torch.Tensor) -> Any:
        """Return the model with a branch's blocks over given states."""
        stand_ins = [_StandIn(block, in_tuple=self._in_tuple) for block in self.trunk.blocks]
        stand_ins[-1] = _StandIn(self.trunk.blocks[-1], in_tuple=self._in_tuple, states=states)
        chain = _copy_down_to(self.trunk.model, self._path)
        chain[-1]._modules[self._name] = torch.nn.ModuleList([*stand_ins, *blocks])
        return chain[0]

    def run(self, blocks: torch.nn.ModuleList, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Run a branch's blocks and the model's final norm: (B, T, width)."""
        model = self._driver(blocks, states)
        out: torch.Tensor = model(**self.trunk.inputs(batch)).last_hidden_state
        return out

    @torch.inference_mode()
    def read_prefix(self, blocks: torch.nn.ModuleList, prefix: Prefix) -> Prefix:
        """Read the trunk's prompts with a branch's own blocks."""
        if prefix.states is None:
            raise OptionError("the trunk kept no states of these prompts; ask passes for them")
        model = self._driver(blocks, prefix.states)
        cache = DynamicCache(config=self.trunk.model.config)
        model(**prefix.inputs(), past_key_values=cache, use_cache=True)
        cache.layers[: self.trunk.top] = prefix.cache.layers[: self.trunk.top]
        return replace(prefix, cache=cache, first=self.trunk.top)

    def pooled(
        self,
        blocks: torch.nn.ModuleList,
        states: torch.Tensor,
        batch: Batch,
        pooling: Pooling,
        *,
        width: int,
    ) -> torch.Tensor:
        """Run a branch and pool its last states: (B, width), zeros where a pooling is narrower."""
        last = self.run(blocks, states, batch)
        rules: list[Rule] = [rule for _, rule in View(self.trunk.depth, pooling).parts()]
        parts = [pool(last, batch.starts, batch.lengths, rule) for rule in rules]
        wide = torch.cat(parts, dim=1)
        return torch.nn.functional.pad(wide, (0, width - wide.shape[1]))
