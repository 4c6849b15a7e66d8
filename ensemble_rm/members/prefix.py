"""Prefix sharing: the completions of one prompt continue from its key–value cache.

(P + C)·G tokens become P + G·C. Prompts stand at the right of their batch and completions at the
left of theirs, so that distances between tokens are those of the unshared text, which attention
windows count. Where a model keeps no such cache, nothing is shared.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ensemble_rm.members.batching import Batch, batches, collate, plan
from ensemble_rm.members.text import Encoded

MIN_SAVED = 16  # tokens; sharing less than this in a group costs more than it saves
_SPREAD = 4  # budgets that the expanded caches of one batch may hold
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


def group(encoded: Sequence[Encoded]) -> tuple[list[list[int]], list[int]]:
    """Return groups of rows that begin with the same prompt, and the rows that stand alone."""
    found: dict[tuple[int, ...], list[int]] = {}
    for row, e in enumerate(encoded):
        found.setdefault(tuple(e.ids[: e.start]), []).append(row)
    groups, alone = [], []
    for prompt, rows in found.items():
        if (len(rows) - 1) * len(prompt) >= MIN_SAVED:
            groups.append(rows)
        else:
            alone += rows
    return groups, alone


def passes(
    encoded: Sequence[Encoded],
    *,
    token_budget: int,
    device: torch.device,
    read: Callable[[list[list[int]]], Prefix] | None,
) -> Iterator[Batch]:
    """Yield every sample once, in batches of similar length that share their prompts.

    Parameters
    ----------
    encoded : sequence of Encoded
    token_budget : int
        Padded tokens in a batch.
    device : torch.device
    read : callable, optional
        Reads prompts; nothing is shared where there is none.
    """
    groups, alone = group(encoded) if read is not None else ([], list(range(len(encoded))))
    lone = [encoded[row] for row in alone]
    for batch in batches(lone, token_budget=token_budget, device=device):
        yield batch.renumbered([alone[i] for i in batch.rows])
    if read is None or not groups:
        return
    lengths = [encoded[rows[0]].start for rows in groups]
    for chosen in plan(lengths, token_budget=token_budget):
        prefix = read([encoded[groups[i][0]].ids[: lengths[i]] for i in chosen])
        rows = [row for i in chosen for row in groups[i]]
        owners = [n for n, i in enumerate(chosen) for _ in groups[i]]
        tails = [_tail(encoded[row]) for row in rows]
        room = max(_SPREAD * token_budget // (prefix.ids.shape[1] + 1), 1)
        sizes = [len(tail.ids) for tail in tails]
        for part in plan(sizes, token_budget=token_budget, max_rows=min(512, room)):
            batch = collate(tails, part, device=device)
            yield batch.renumbered(
                [rows[i] for i in part],
                prefix=prefix,
                owners=torch.tensor([owners[i] for i in part], device=device),
            )


def _tail(encoded: Encoded) -> Encoded:
    """Return the completion alone."""
    return Encoded(encoded.ids[encoded.start :], 0)
