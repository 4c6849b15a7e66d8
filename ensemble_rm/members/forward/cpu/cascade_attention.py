"""Attention to a prompt once for all its completions (cascade), on a CPU.

The queries of all completions of a prompt form one row against its keys, which are not copied;
each completion attends to itself apart from that, and the two results are put together by the
log-sum-exp of their scores. This is attention itself, split where the keys are.

References
----------
.. [1] Juravsky et al. 2024, Hydragen, arXiv 2402.05099.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

KEYWORD = "shared_prompts"
"""Under which a forward pass hands them down to attention, as transformers' models do."""
LAST = "last_keys"
"""Under which goes the place of the block whose keys are the last that anyone wants."""
_LONGER = 2  # times a completion: shorter prompts are copied as quickly


class KeysKept(Exception):  # noqa: N818 - no error: it ends a pass that has done its work
    """The last block has put its keys and values into the cache."""


@dataclass(frozen=True)
class SharedPrompts:
    """Prompts that the rows of a batch continue.

    Attributes
    ----------
    layers : sequence of transformers cache layers
        Keys and values, (N, groups, P, D), of prompts padded on the right.
    runs : list of (int, int, int)
        Of rows that stand side by side and continue one prompt: which prompt, how many of its
        first keys are tokens, how many rows.
    seen : set of int
        The layers that attended to them.
    """

    layers: Sequence[Any]
    runs: list[tuple[int, int, int]]
    seen: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, layers: Sequence[Any], lengths: torch.Tensor, owners: torch.Tensor
    ) -> SharedPrompts:
        """Find the runs of rows; `lengths`, (N,), are the prompts', `owners`, (B,), the rows'."""
        chosen, counts = torch.unique_consecutive(owners, return_counts=True)
        runs = zip(chosen.tolist(), lengths[chosen].tolist(), counts.tolist(), strict=True)
        return cls(layers, list(runs))


def pays(prompt: int, completion: int, device: torch.device) -> bool:
    """Say whether attention in parts is quicker, by the padded lengths (benchmarks/LOG.md)."""
    return device.type == "cpu" and prompt >= _LONGER * completion


def cascade_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompts: SharedPrompts,
    layer: int,
    scaling: float | None,
) -> torch.Tensor:
    """Attend to the prompts, and causally to the completions' own tokens.

    Parameters
    ----------
    query : torch.Tensor
        (B, heads, T, D), padded on the right.
    key, value : torch.Tensor
        (B, groups, T, D) of the completions.
    prompts : SharedPrompts
    layer : int
        Whose keys and values of the prompts are read.
    scaling : float, optional
        Of the scores; 1/√D where it is not given.

    Returns
    -------
    torch.Tensor
        (B, T, heads, D).
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    prompts.seen.add(layer)
    kept = prompts.layers[layer]
    own, own_lse = flash(query, key, value, is_causal=True, scale=scaling)
    out: torch.Tensor = own.transpose(1, 2)
    by_token, own_lse = query.transpose(1, 2), own_lse.transpose(1, 2)
    start = 0
    for prompt, length, rows in prompts.runs:
        its = slice(start, start + rows)
        folded = by_token[its].flatten(0, 1)[None].transpose(1, 2)  # (1, heads, rows·T, D)
        keys, values = (x[prompt : prompt + 1, :, :length] for x in (kept.keys, kept.values))
        found, lse = flash(folded, keys, values, scale=scaling)
        weight = torch.sigmoid(lse[0].T.view_as(own_lse[its]) - own_lse[its])
        found = found[0].transpose(0, 1).view_as(out[its])
        out[its].lerp_(found, weight[..., None].to(out.dtype))
        start += rows
    return out.contiguous()
