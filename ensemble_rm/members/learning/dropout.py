"""The dropout of a pretrained model's own layers, in training."""

from __future__ import annotations

import torch

_FLOATS = ("attention_dropout",)  # attributes that hold a rate without a Dropout module


def set_dropout(model: torch.nn.Module, rate: float | None) -> None:
    """Set every dropout rate of a model, attention included; None leaves them as they are."""
    if rate is None:
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        for name in _FLOATS:
            if isinstance(getattr(module, name, None), float | int):
                setattr(module, name, rate)
