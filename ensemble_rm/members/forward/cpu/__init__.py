"""What is for CPUs alone: quicker kernels, and attention to shared prompts in parts.

Imported where a model is put on a CPU, and nowhere else: other devices run transformers' own code.
"""

from __future__ import annotations

from typing import Any

import torch

from ensemble_rm.members.forward.cpu.grouped_attention import group_heads
from ensemble_rm.members.forward.cpu.kernels import quicken


def use_cpu_kernels(model: Any, *others: torch.nn.Module) -> None:
    """Give a model on a CPU, and blocks that were taken from it, their quicker forward passes."""
    cpu = torch.device("cpu")
    group_heads(model, cpu)
    quicken((model, *others), cpu)
