"""Prefix sharing: the completions of one prompt continue from its key–value cache.

(P + C)·G tokens become P + G·C. Prompts stand at the right of their batch and completions at the
left of theirs, so that distances between tokens are those of the unshared text, which attention
windows count. Where a model keeps no such cache, nothing is shared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prefix:
    """Prompts that were read once, and what their completions continue from.

    Attributes
    ----------
    ids, mask : torch.Tensor
        (N, P) token ids and attention mask, padded on the left.
    lengths : torch.Tensor
        (N,) number of real tokens.
    cache : transformers Cache
        Keys and values of the prompts.
    first : int
        The lowest block whose keys and values are needed; of those below, only the length is.
    states : torch.Tensor, optional
        (N, P, width) after the trunk's last block, from which branches read the prompts.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    cache: Cache
    first: int = 0
    states: torch.Tensor | None = None

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return what reads the prompts: ids, mask and positions."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": positions}

    def continued(self, owners: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """Return what continues the prompts.

        Parameters
        ----------
        owners : torch.Tensor
            (B,) which prompt each completion continues.
        mask : torch.Tensor
            (B, T) attention mask of the completions.

        Returns
        -------
        dict
            Mask, positions and a cache of their own, which the forward pass may grow.
        """
        steps = torch.arange(mask.shape[1], device=mask.device)
        cache = copy.copy(self.cache)
        cache.layers = [
            _chosen(layer, owners) if i >= self.first else copy.copy(layer)
            for i, layer in enumerate(self.cache.layers)
        ]
        return {
            "attention_mask": torch.cat([self.mask[owners], mask], dim=1),
            "position_ids": self.lengths[owners][:, None] + steps,
            "past_key_values": cache,
            "use_cache": True,
        }


def _chosen(layer: Any, owners: torch.Tensor) -> Any:
    twin = copy.copy(layer)
    if layer.is_initialized:
        twin.keys, twin.values = layer.keys[owners], layer.values[owners]
    return twin


def left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, P) ids and mask, padded on the left."""
    widest = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), widest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, widest - len(prompt) :] = torch.tensor(prompt)
        mask[row, widest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@torch.inference_mode()
def keeps_a_cache(model: Any, device: torch.device) -> bool:
    """Say whether a model's prompts can be shared: it is asked on two tokens."""
    ids = torch.ones(1, 2, dtype=torch.int64, device=device)
    out = model(input_ids=ids, attention_mask=ids, use_cache=True)
    cache = getattr(out, "past_key_values", None)
    layers = getattr(cache, "layers", [])
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    shared = any(layer.is_initialized for layer in layers) and all(
        type(layer) in known for layer in layers
    )
    if not shared:
        _log.debug("%s keeps no cache of keys and values: no prefix is shared", type(model))
    return shared


@torch.inference_mode()
def read_prefix(model: Any, prompts: Sequence[Sequence[int]], device: torch.device) -> Prefix:
    """Read prompts and keep their keys and values."""
    ids, mask = left_padded(prompts, device)
    empty = Prefix(ids, mask, mask.sum(1), Cache(layers=[]))
    out = model(**empty.inputs(), use_cache=True)
    return Prefix(ids, mask, empty.lengths, out.past_key_values)
