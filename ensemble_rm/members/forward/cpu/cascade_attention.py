"""Cascade attention on a CPU: completions attend to their prompt without copying its keys [1]_.

The queries of all completions of a prompt are concatenated to one sequence, which attends to the
prompt's keys. Separately, each completion attends to its own tokens. The two outputs are averaged
with weights from the log-sum-exp of their scores, which gives exactly the attention over all keys.

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
"""Keyword argument of the forward pass that carries `SharedPrompts` down to attention."""
LAST = "last_keys"
"""Keyword argument with the index of the last block whose keys are needed."""
# A prompt must be this many times as long as the completions; shorter ones are cheaper to copy.
_LONGER = 2


class KeysKept(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass once the last block has cached its keys and values."""


@dataclass(frozen=True)
class SharedPrompts:
    """Prompts that the rows of a batch continue.

    Attributes
    ----------
    layers : sequence of transformers cache layers
        Keys and values, (N, groups, P, D), of prompts padded on the right.
    runs : list of (int, int, int)
        Adjacent rows that continue the same prompt, as (index of the prompt, its number of
        tokens, number of rows).
    seen : set of int
        Indices of the layers that attended to the prompts.
    """

    layers: Sequence[Any]
    runs: list[tuple[int, int, int]]
    seen: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, layers: Sequence[Any], lengths: torch.Tensor, owners: torch.Tensor
    ) -> SharedPrompts:
        """Find the runs of rows, from the prompts' `lengths` (N,) and the rows' `owners` (B,)."""
        chosen, counts = torch.unique_consecutive(owners, return_counts=True)
        runs = zip(chosen.tolist(), lengths[chosen].tolist(), counts.tolist(), strict=True)
        return cls(layers, list(runs))


def pays(prompt: int, completion: int, device: torch.device) -> bool:
    """Return whether cascade attention is faster, by the padded lengths (benchmarks/LOG.md)."""
    return device.type == "cpu" and prompt >= _LONGER * completion


def cascade_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompts: SharedPrompts,
    layer: int,
    scaling: float | None,
) -> torch.Tensor:
    """Compute attention to the prompts and, causally, to the completions' own tokens.

    Parameters
    ----------
    query : torch.Tensor
        (B, heads, T, D), padded on the right.
    key, value : torch.Tensor
        (B, groups, T, D), of the completions.
    prompts : SharedPrompts
    layer : int
        Index of the layer, whose keys and values of the prompts are read.
    scaling : float, optional
        Factor of the scores (default: 1/√D).

    Returns
    -------
    torch.Tensor
        (B, T, heads, D).
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    prompts.seen.add(layer)
    cached = prompts.layers[layer]
    own, own_lse = flash(query, key, value, is_causal=True, scale=scaling)
    out: torch.Tensor = own.transpose(1, 2)
    by_token, own_lse = query.transpose(1, 2), own_lse.transpose(1, 2)
    start = 0
    for prompt, length, rows in prompts.runs:
        run = slice(start, start + rows)
        folded = by_token[run].flatten(0, 1)[None].transpose(1, 2)  # (1, heads, rows·T, D)
        keys, values = (x[prompt : prompt + 1, :, :length] for x in (cached.keys, cached.values))
        attended, lse = flash(folded, keys, values, scale=scaling)
        # The share of the prompt in the softmax over all keys: e^a / (e^a + e^b) = σ(a − b).
        weight = torch.sigmoid(lse[0].T.view_as(own_lse[run]) - own_lse[run])
        attended = attended[0].transpose(0, 1).view_as(out[run])
        out[run].lerp_(attended, weight[..., None].to(out.dtype))
        start += rows
    return out.contiguous()
