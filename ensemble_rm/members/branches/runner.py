"""Copies of a trunk's top blocks, run on token states that the trunk made once.

The model's own forward pass runs them, so that masks, positions and the final norm are its own:
each lower block is replaced by one that computes nothing, and the last of these returns the states.
Must not know heads, losses or files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache

from ensemble_rm.errors import ModelError, OptionError
from ensemble_rm.members.backbone.trunk import Pooling, Rule, Trunk, View, keeps_a_cache, pool
from ensemble_rm.members.encoding import Encoded
from ensemble_rm.members.forward.batching import Batch, passes
from ensemble_rm.members.forward.prefix_cache import (
    Prefix,
    padded,
    read_keys,
    splits_attention,
)


class _StandIn(torch.nn.Module):
    """Replaces a block: returns the states that it was made with, or its input."""

    def __init__(
        self, block: torch.nn.Module, *, in_tuple: bool, states: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that its weights are not registered here
        self._in_tuple = in_tuple
        self._states = states

    def __getattr__(self, name: str) -> Any:
        """Read attributes of the block: models read its kind of attention, for example."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        """Return states as the block would return them."""
        out = states if self._states is None else self._states
        return (out, None) if self._in_tuple else out


def _copy_down_to(model: torch.nn.Module, path: Sequence[str]) -> list[torch.nn.Module]:
    """Copy a model and its children along `path`; all else, weights included, is shared."""
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
        Up to the last block that all branches share, with at least one block above it. If the
        branches share no block, each run starts from the tokens.

    Raises
    ------
    OptionError
        If there is no block above the trunk.
    """

    def __init__(self, trunk: Trunk) -> None:
        if trunk.top >= trunk.depth:
            raise OptionError(
                f"the trunk has all {trunk.depth} blocks and leaves none to branch; use a lower top"
            )
        self.trunk = trunk
        trunk.rest.to(trunk.device)
        self._in_tuple = trunk.top > 0 and self._returns_tuple()
        self._keeps: bool | None = None  # cached result of `_is_causal` if no block is shared

    @property
    def shares(self) -> bool:
        """Whether the branches share a block."""
        return self.trunk.top > 0

    def states(self, batch: Batch) -> torch.Tensor | None:
        """Return the (B, T, width) states that branches start from; None without shared blocks."""
        return self.trunk.states(batch) if self.shares else None

    @torch.inference_mode()
    def _returns_tuple(self) -> bool:
        """Return whether the trunk's last block returns a tuple, by running one token."""
        seen: list[Any] = []
        hook = self.trunk.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
        token = torch.ones(1, 1, dtype=torch.int64, device=self.trunk.device)
        try:
            self.trunk.model(input_ids=token, attention_mask=token)
        finally:
            hook.remove()
        if not isinstance(seen[0], torch.Tensor | tuple):
            raise ModelError(
                f"a block of {type(self.trunk.model).__name__} returns {type(seen[0]).__name__}, "
                "not a tensor or a tuple; use kind 'head' or 'full' with this backbone"
            )
        return isinstance(seen[0], tuple)

    def _driver(self, blocks: torch.nn.ModuleList, states: torch.Tensor | None) -> Any:
        """Return the model with a branch's blocks over given states."""
        shared = self.trunk.blocks
        stand_ins = [_StandIn(block, in_tuple=self._in_tuple) for block in shared]
        if self.shares:
            stand_ins[-1] = _StandIn(shared[-1], in_tuple=self._in_tuple, states=states)
        *path, name = self.trunk.path
        chain = _copy_down_to(self.trunk.model, path)
        chain[-1]._modules[name] = torch.nn.ModuleList([*stand_ins, *blocks])
        return chain[0]

    def passes(self, encoded: Sequence[Encoded], blocks: torch.nn.ModuleList) -> Iterator[Batch]:
        """Yield every sample once, in batches that share their prompts if the model allows it."""
        trunk = self.trunk
        if self.shares:
            return trunk.passes(encoded, states=True)

        keeps = trunk.options.share_prefix and self._is_causal(blocks)
        # There is no trunk to read prompts: each branch fills its own cache, in `read_prefix`.
        splits = keeps and splits_attention(self._driver(blocks, None), trunk.device)

        def read(prompts: list[list[int]]) -> Prefix:
            ids, mask = padded(prompts, trunk.device, right=splits)
            return Prefix(ids, mask, mask.sum(1), Cache(layers=[]), splits=splits)

        return passes(
            encoded,
            token_budget=trunk.token_budget,
            device=trunk.device,
            read=read if keeps else None,
            splits=splits,
        )

    def _is_causal(self, blocks: torch.nn.ModuleList) -> bool:
        """Return whether tokens attend only to earlier ones; tested once, by a forward pass."""
        if self.shares:
            return self.trunk.causal
        if self._keeps is None:
            self._keeps = keeps_a_cache(self._driver(blocks, None), self.trunk.device)
        return self._keeps

    def run(
        self, blocks: torch.nn.ModuleList, states: torch.Tensor | None, batch: Batch
    ) -> torch.Tensor:
        """Run a branch's blocks and the model's final norm: (B, T, width)."""
        model = self._driver(blocks, states)
        inputs = self.trunk.inputs(batch, causal=self._is_causal(blocks))
        out: torch.Tensor = model(**inputs).last_hidden_state
        return out

    @torch.inference_mode()
    def read_prefix(self, blocks: torch.nn.ModuleList, prefix: Prefix) -> Prefix:
        """Run prompts through a branch's blocks, from the trunk's states if there are any."""
        if self.shares and prefix.states is None:
            raise OptionError(
                "the trunk kept no states of these prompts; call `Trunk.passes` with states=True"
            )
        model = self._driver(blocks, prefix.states)
        cache = read_keys(model, prefix)
        # The lower blocks did not run here; their caches give masks and positions the right length.
        cache.layers[: self.trunk.top] = prefix.cache.layers[: self.trunk.top]
        return replace(prefix, cache=cache, first=self.trunk.top)

    def pooled(
        self,
        blocks: torch.nn.ModuleList,
        states: torch.Tensor | None,
        batch: Batch,
        pooling: Pooling,
        *,
        width: int,
    ) -> torch.Tensor:
        """Run a branch and pool its last states: (B, width), padded with zeros on the right."""
        last = self.run(blocks, states, batch)
        rules: list[Rule] = [rule for _, rule in View(self.trunk.depth, pooling).parts()]
        parts = [pool(last, batch.starts, batch.lengths, rule) for rule in rules]
        features = torch.cat(parts, dim=1)
        return torch.nn.functional.pad(features, (0, width - features.shape[1]))
