"""Prefix sharing: the completions of one prompt continue from its key–value cache.

(P + C)·G tokens become P + G·C. Prompts stand at the right of their batch and completions at the
left of theirs, so that distances between tokens are those of the unshared text, which attention
windows count; where attention is computed in parts, which knows no windows, both stand at the left.
Where a model keeps no such cache, nothing is shared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


@dataclass(frozen=True)
class Prefix:
    """Prompts that were read once, and what their completions continue from.

    Attributes
    ----------
    ids, mask : torch.Tensor
        (N, P) token ids and attention mask, padded on the left; on the right where it splits.
    lengths : torch.Tensor
        (N,) number of real tokens.
    cache : transformers Cache
        Keys and values of the prompts.
    first : int
        The lowest block whose keys and values are needed; of those below, only the length is.
    states : torch.Tensor, optional
        (N, P, width) after the trunk's last block, from which branches read the prompts.
    splits : bool
        Whether the model can attend to prompts and completions apart, without copies of keys.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    cache: Cache
    first: int = 0
    states: torch.Tensor | None = None
    splits: bool = False

    def inputs(self) -> dict[str, Any]:
        """Return what reads the prompts: ids, mask and positions."""
        if self.splits:  # a prompt does not see the padding on its right
            steps = torch.arange(self.ids.shape[1], device=self.ids.device)
            mask, positions = torch.ones_like(self.mask), steps.expand_as(self.ids)
            return {"input_ids": self.ids, "attention_mask": mask, "position_ids": positions}
        # Left padding: positions count from each prompt's own first token.
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
            Mask, positions and a cache of their own, which the forward pass may grow; where
            attention in parts is quicker, the prompts in its place. Then padding, which stands on
            the right, needs no mask.
        """
        steps = torch.arange(mask.shape[1], device=mask.device)
        # A completion continues at its prompt's length, padding not counted.
        positions = self.lengths[owners][:, None] + steps
        if self.splits:  # on a CPU alone
            from ensemble_rm.members.forward.cpu.cascade_attention import pays

            # Splitting costs a second attention call, which short prompts do not repay.
            if pays(self.ids.shape[1], mask.shape[1], mask.device):
                return self.apart(owners, positions)
        cache = copy.copy(self.cache)
        # Copies: a model appends to the cache that it is given.
        cache.layers = [
            _chosen(layer, owners) if i >= self.first else copy.copy(layer)
            for i, layer in enumerate(self.cache.layers)
        ]
        return {
            "attention_mask": torch.cat([self.mask[owners], mask], dim=1),
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
        }

    def apart(self, owners: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
        """Return what continues the prompts where attention is computed in parts."""
        from ensemble_rm.members.forward.cpu.cascade_attention import KEYWORD, SharedPrompts

        return {
            "attention_mask": torch.ones_like(positions),
            "position_ids": positions,
            "use_cache": False,
            KEYWORD: SharedPrompts.of(self.cache.layers, self.lengths, owners),
        }


def _chosen(layer: Any, owners: torch.Tensor) -> Any:
    twin = copy.copy(layer)
    if layer.is_initialized:
        # Keys and values of each row's own prompt, (n_rows, n_heads, n_prompt, n_dim).
        twin.keys, twin.values = layer.keys[owners], layer.values[owners]
    return twin


def join_prefixes(parts: Sequence[Prefix]) -> Prefix:
    """Put prompts that were read apart side by side; several must be of the kind that splits."""
    if len(parts) == 1:
        return parts[0]
    widest = max(part.ids.shape[1] for part in parts)

    def wide(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        short = widest - tensor.shape[axis]
        # Zeros on the right of one axis, up to the widest prompt.
        return torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - 1 - axis) + [0, short])

    cache = copy.copy(parts[0].cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    cache.layers = layers
    for i, layer in enumerate(layers):
        if layer.is_initialized:
            its: list[Any] = [part.cache.layers[i] for part in parts]
            layer.keys = torch.cat([wide(own.keys, 2) for own in its])
            layer.values = torch.cat([wide(own.values, 2) for own in its])
    states = [part.states for part in parts if part.states is not None]
    return replace(
        parts[0],
        ids=torch.cat([wide(part.ids, 1) for part in parts]),
        mask=torch.cat([wide(part.mask, 1) for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        cache=cache,
        states=torch.cat([wide(own, 1) for own in states]) if states else None,
    )


def padded(
    prompts: Sequence[Sequence[int]], device: torch.device, *, right: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, P) ids and mask, padded on one side."""
    # Token 0 under a mask of 0: its value has no effect.
    widest = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), widest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        its = slice(0, len(prompt)) if right else slice(widest - len(prompt), widest)
        ids[row, its] = torch.tensor(prompt)
        mask[row, its] = 1
    return ids.to(device), mask.to(device)


@torch.inference_mode()
def splits_attention(model: Any, device: torch.device) -> bool:
    """Say whether a model that keeps a cache can attend to prompts and completions apart.

    It is asked on a few texts: each layer that keeps keys must have attended to the prompt's, and
    the states must be those of the whole text.
    """
    if device.type != "cpu":
        return False
    from ensemble_rm.members.forward.cpu.cascade_attention import KEYWORD

    size = model.config.get_text_config().vocab_size
    # Five different prompts of odd lengths, spread over the vocabulary.
    text = (torch.arange(35, device=device).view(5, 7) * 7919 + 101) % size
    whole = model(input_ids=text, attention_mask=torch.ones_like(text)).last_hidden_state[:, 4:]
    owners, positions = torch.arange(1, 6), torch.arange(4, 7).expand(5, -1)
    try:
        prefix = read_prefix(model, [[0], *text[:, :4].tolist()], device, splits=True)
        layers: list[Any] = prefix.cache.layers
        if any(type(layer) is not DynamicLayer for layer in layers):
            return False
        inputs = prefix.apart(owners, positions)
        found = model(input_ids=text[:, 4:], **inputs).last_hidden_state
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False  # it hands nothing down to its attention, or torch lacks the kernel
    # The two sum in different orders, so that they agree to rounding only.
    near = 1e-4 if whole.dtype == torch.float32 else 0.05
    # Of the texts' median: in bfloat16 a text that means nothing can turn out any way.
    gap = ((found - whole).float().norm(dim=(1, 2)) / whole.float().norm(dim=(1, 2))).median()
    return bool(
        gap <= near
        and inputs[KEYWORD].seen == {i for i, layer in enumerate(layers) if layer.is_initialized}
    )


@torch.inference_mode()
def read_prefix(
    model: Any,
    prompts: Sequence[Sequence[int]],
    device: torch.device,
    *,
    splits: bool = False,
    whole: bool = False,
) -> Prefix:
    """Read prompts and keep their keys and values.

    Parameters
    ----------
    model : transformers model
    prompts : sequence of sequence of int
        Token ids.
    device : torch.device
    splits : bool
        Whether it attends to prompts and completions apart.
    whole : bool
        Whether the last block runs to its end, because its output is read.
    """
    ids, mask = padded(prompts, device, right=splits)
    empty = Prefix(ids, mask, mask.sum(1), Cache(layers=[]), splits=splits)
    # Only keys and values are needed, so that the last block's output is not computed.
    if splits and not whole:
        return replace(empty, cache=read_keys(model, empty))
    out = model(**empty.inputs(), use_cache=True)
    return replace(empty, cache=out.past_key_values)


@torch.inference_mode()
def read_keys(model: Any, prefix: Prefix) -> Cache:
    """Run a model over prompts for the sake of every block's keys and values.

    The last block's output for a prompt is never read: where the model splits its attention, the
    pass stops when that block has its keys.
    """
    cache = DynamicCache(config=model.config)
    inputs = prefix.inputs() | {"past_key_values": cache, "use_cache": True}
    if not prefix.splits:
        model(**inputs)
        return cache
    from ensemble_rm.members.forward.cpu.cascade_attention import LAST, KeysKept

    places = (getattr(module, "layer_idx", None) for module in model.modules())
    with contextlib.suppress(KeysKept):
        model(**inputs, **{LAST: max(i for i in places if i is not None)})
    return cache
