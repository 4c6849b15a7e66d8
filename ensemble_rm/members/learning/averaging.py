"""Means of weights: models that were fine-tuned from the same weights, as one model.

Such models lie in one basin of the loss, so that the mean of their weights is a model too, at a
single model's price [1]_. Means are taken in float64. What a kind averages is in its scorer's
`average`.

References
----------
.. [1] Ramé et al. 2024 (WARM), arXiv 2401.12187: φ = (1/M) Σ φᵢ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ensemble_rm.errors import ModelError
from ensemble_rm.file_modes import follow_umask

NAME = "merged"  # of the averaged member


def average_tensors(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of tensors of one shape, in their own dtype.

    Raises
    ------
    ModelError
        If the shapes differ, or integer tensors do.
    """
    first = tensors[0]
    require_same(f"shape of {name}", [tuple(tensor.shape) for tensor in tensors])
    if not first.is_floating_point():
        if any(not torch.equal(first, tensor) for tensor in tensors):
            raise ModelError(f"the members' whole numbers {name!r} differ; they have no mean")
        return first
    total = torch.stack([tensor.double() for tensor in tensors]).mean(0)
    return total.to(first.dtype)


def average_files(sources: Sequence[Path], target: Path) -> None:
    """Average safetensors files tensor by tensor, so that no two models are in memory.

    Raises
    ------
    ModelError
        If the files hold tensors of other names or shapes.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(source, framework="pt")) for source in sources]
        require_same(f"weights in {target.name}", [sorted(file.keys()) for file in files])
        means = {
            name: average_tensors(name, [file.get_tensor(name) for file in files])
            for name in sorted(files[0].keys())
        }
        save_file(means, target, metadata=files[0].metadata())
        follow_umask(target)


def require_two(members: int) -> None:
    """Raise `ModelError` if there is only one member."""
    if members < 2:
        raise ModelError("there is one member; its mean is itself")


def require_same(what: str, values: Iterable[Any]) -> None:
    """Raise `ModelError` if the members' values differ; `what` names them in the message."""
    first, *others = values
    other = next((value for value in others if value != first), None)
    if other is not None:
        raise ModelError(
            f"the members differ in their {what}: {str(first)[:60]}, {str(other)[:60]}"
        )
