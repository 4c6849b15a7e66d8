"""Token states → one vector a sample. The one place that says where a reward is read.

Both rules go by the attention mask (as lengths), never by token ids.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Rule: TypeAlias = Literal["last", "mean"]
Pooling: TypeAlias = Literal["last", "mean", "both"]
RULES: tuple[Rule, ...] = ("last", "mean")
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "both")
"""``both`` is last and mean, one after the other."""


def pool(
    states: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Pool right-padded token states to float32 vectors.

    Parameters
    ----------
    states : torch.Tensor
        (B, T, D).
    starts, lengths : torch.Tensor
        (B,) first token of the completion, number of attended tokens.
    rule : {"last", "mean"}
        The last attended token, or the mean over the completion's tokens.

    Returns
    -------
    torch.Tensor
        (B, D) float32.
    """
    if rule == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1].float()
    positions = torch.arange(states.shape[1], device=states.device)  # (T,)
    inside = (positions >= starts[:, None]) & (positions < lengths[:, None])  # (B, T)
    weights = inside.float() / inside.sum(1, keepdim=True)
    return torch.einsum("bt,btd->bd", weights, states.float())
