"""How many padded tokens a batch holds, where nobody says: found from the model and its device.

Never from a clock: equal models on equal devices form equal batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from ensemble_rm.errors import OptionError

CPU_BYTES = 6 * 2**20
"""Of a pass's widest tensor on a CPU; of the bounds measured, the best (benchmarks/LOG.md)."""
CUDA_SHARE = 1 / 4
"""Of the memory that is free at loading, for what a batch needs at its peak."""
CUDA_CAP = 32768
MPS_TOKENS = 8192
LEAST = 512
PASS_COST = 0.1
"""Of a pass beside its tokens, as a share of the budget: measured with AMX (benchmarks/LOG.md)."""
_CHEAP = 0.02  # where tokens are dear: a CPU without AMX
_COPIES = 6  # of a block's widest tensor, which are alive at once
_CACHED = 5  # tokens with keys and values in every block, to each of a batch's


def _matrices(*modules: torch.nn.Module) -> Iterator[torch.Size]:
    """Yield the shapes of all weights that act on a token's states."""
    for module in chain.from_iterable(m.modules() for m in modules):
        if not isinstance(module, torch.nn.Embedding):
            yield from (p.shape[-2:] for p in module.parameters(recurse=False) if p.ndim >= 2)


def pick_token_budget(
    asked: int | None, *modules: torch.nn.Module, width: int, depth: int, device: torch.device
) -> int:
    """Return the padded tokens of a batch.

    On a CPU, the largest power of two at which the widest tensor of a pass stays within
    `CPU_BYTES`. On cuda, the largest at which what a batch needs at its peak, counted from the
    model's shape, stays within `CUDA_SHARE` of the memory that is free, at most `CUDA_CAP`. On
    mps, `MPS_TOKENS`.

    Parameters
    ----------
    asked : int, optional
        What the user says, which holds.
    *modules : torch.nn.Module
        That hold the model's blocks.
    width, depth : int
        Of the token states, and the number of blocks.
    device : torch.device

    Raises
    ------
    OptionError
        If less than one token is asked for.
    """
    if asked is not None:
        if asked < 1:
            raise OptionError(f"token_budget must be at least 1, not {asked}")
        return asked
    if device.type not in ("cpu", "cuda"):
        return MPS_TOKENS
    size = max((p.element_size() for m in modules for p in m.parameters()), default=4)
    widest = max((max(shape) for shape in _matrices(*modules)), default=width)
    row = max(widest * size, width * 4)  # bytes a token; norms run in float32
    if device.type == "cpu":
        return _power(CPU_BYTES / row)
    free, _ = torch.cuda.mem_get_info(device)
    kept = _CACHED * depth * 2 * width * size  # as if no heads were grouped
    return min(_power(CUDA_SHARE * free / (_COPIES * row + kept)), CUDA_CAP)


def pass_cost(device: torch.device) -> float:
    """Return what a pass costs beside its tokens, as a share of the budget, by the device."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # torch 2.4 does not know
    return _CHEAP if device.type == "cpu" and not has_amx() else PASS_COST


def _power(tokens: float) -> int:
    """Return the largest power of two that is no more than that, or the least budget."""
    return max(1 << max(int(tokens), 1).bit_length() - 1, LEAST)
