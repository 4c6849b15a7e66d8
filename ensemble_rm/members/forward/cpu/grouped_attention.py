"""Attention on a CPU that does not copy grouped key–value heads.

With a mask, transformers repeats the heads of keys and values, since kernels for GPUs require it.
Kernels for CPUs do not, and the copies cost more than the attention itself. This is transformers'
sdpa attention except in that case and for cascade attention, under its own name in the registry of
transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ensemble_rm.members.forward.cpu.cascade_attention import (
    KEYWORD,
    LAST,
    KeysKept,
    cascade_attention,
)

NAME = "ensemble_rm_grouped_sdpa"
# Arguments that change attention; with any of them, transformers' function runs.
_SPECIAL = ("position_bias", "cache", "softcap", "s_aux")


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with the signature and the result of transformers' sdpa.

    Parameters
    ----------
    module : torch.nn.Module
    query : torch.Tensor
        (B, heads, T, D).
    key, value : torch.Tensor
        (B, groups, S, D).
    attention_mask : torch.Tensor, optional
        (B, 1, T, S).
    dropout, scaling, is_causal
        As transformers passes them.
    **more
        `KEYWORD`: prompts that the rows continue. `LAST`: index of the last block whose keys are
        needed. Other arguments are passed on to transformers' function.

    Returns
    -------
    torch.Tensor
        (B, T, heads, D), and None in place of weights.

    Raises
    ------
    KeysKept
        In the last block whose keys are needed, instead of attention.
    """
    plain = attention_mask is None or query.shape[1] == key.shape[1]
    special = any(more.get(name) is not None for name in _SPECIAL)
    prompts, last = more.pop(KEYWORD, None), more.pop(LAST, None)
    if last is not None and last == getattr(module, "layer_idx", None):
        raise KeysKept  # transformers has cached the keys before it calls this
    if prompts is not None and more.get("sliding_window") is None and not special:
        layer: Any = module.layer_idx
        return cascade_attention(query, key, value, prompts, layer, scaling), None
    if plain or special or query.device.type != "cpu":
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **more
        )
        return out
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None


def group_heads(model: Any, device: torch.device) -> None:
    """Use this attention in a model that runs on a CPU with transformers' sdpa."""
    if device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, grouped_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
