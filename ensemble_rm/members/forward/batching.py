"""Encoded samples → padded batches of similar length that share their prompts.

Batches are filled to a budget of padded tokens, longest first, so that little is padding and a
lack of memory shows at once. Where a model can share prompts, each prompt is read once for all its
completions. Padding is on the right whatever the tokenizer prefers; the mask comes from lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from ensemble_rm.errors import OptionError
from ensemble_rm.members.encoding import Encoded
from ensemble_rm.members.forward.prefix_cache import Prefix, join_prefixes

CPU_BYTES = 6 * 2**20
"""Of a pass's widest tensor on a CPU; of the bounds measured, the best (benchmarks/LOG.md)."""
CUDA_SHARE = 1 / 4
"""Of the memory that is free at loading, for what a batch needs at its peak."""
CUDA_CAP = 32768
MPS_TOKENS = 8192
LEAST = 512
PASS_COST = 0.1
"""Fixed cost of a pass, as a share of the budget: measured with AMX (benchmarks/LOG.md)."""
_CHEAP = 0.02  # where tokens are dear: a CPU without AMX
_COPIES = 6  # of a block's widest tensor, which are alive at once
_CACHED = 5  # tokens with keys and values in every block, to each of a batch's
MIN_SAVED = 16  # tokens; sharing less than this in a group costs more than it saves
_SPREAD = 4  # budgets that the expanded caches of one batch may hold
_HELD = 4  # budgets of prompts that are kept at once, where their caches need not be expanded


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded batch.

    Attributes
    ----------
    rows : list of int
        Which samples these are, in the caller's numbering.
    ids, mask : torch.Tensor
        (B, T) token ids and attention mask (int64).
    types : torch.Tensor, optional
        (B, T) token type ids.
    starts, lengths : torch.Tensor
        (B,) index of the completion's first token, and number of real tokens.
    prefix : Prefix, optional
        Prompts that these samples continue; the tensors above then hold the completions alone.
    owners : torch.Tensor, optional
        (B,) which prompt of the prefix each sample continues.
    causal : bool
        The model looks at earlier tokens alone: padding on the right needs no mask, and attention
        without one is quicker.
    """

    rows: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    types: torch.Tensor | None
    starts: torch.Tensor
    lengths: torch.Tensor
    prefix: Prefix | None = None
    owners: torch.Tensor | None = None
    causal: bool = False

    def renumbered(
        self,
        rows: list[int],
        *,
        prefix: Prefix | None = None,
        owners: torch.Tensor | None = None,
    ) -> Batch:
        """Return the batch in other numbers, continuing prompts where they are given."""
        return replace(self, rows=rows, prefix=prefix, owners=owners)

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a transformers forward pass."""
        if self.prefix is not None and self.owners is not None:
            return {"input_ids": self.ids} | self.prefix.continued(self.owners, self.mask)
        mask = torch.ones_like(self.mask) if self.causal else self.mask
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": mask}
        if self.types is not None:
            inputs["token_type_ids"] = self.types
        return inputs


def plan(
    lengths: Sequence[int],
    *,
    token_budget: int,
    max_rows: int = 512,
    cost: float = PASS_COST,
) -> list[list[int]]:
    """Group rows by length, longest first, each group within the budget of padded tokens.

    Of all ways to cut the sorted rows, this is the one with the fewest padded tokens plus fixed
    costs: dynamic programming over the rows where a group may begin.

    Parameters
    ----------
    lengths : sequence of int
        In tokens.
    token_budget : int
        Padded tokens of a group.
    max_rows : int
        Of a group.
    cost : float
        Fixed cost of a pass, as a share of the budget; see `pass_cost`.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    widths = np.asarray(lengths, dtype=np.int64)[order]
    n, fixed = len(widths), token_budget * cost
    spent, begin = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    low = 0
    for end in range(1, n + 1):
        # A wider first row and more of them only grow a group: its earliest beginning moves on.
        low = max(low, end - max_rows)
        while low < end - 1 and (end - low) * widths[low] > token_budget:
            low += 1
        total = spent[low:end] + np.arange(end - low, 0, -1) * widths[low:end]
        best = int(np.argmin(total))
        spent[end], begin[end] = total[best] + fixed, low + best
    cuts = [n]
    while cuts[-1] > 0:
        cuts.append(int(begin[cuts[-1]]))
    edges = cuts[::-1]
    return [order[i:j].tolist() for i, j in itertools.pairwise(edges)]


def collate(encoded: Sequence[Encoded], rows: list[int], *, device: torch.device) -> Batch:
    """Pad the given rows on the right."""
    chosen = [encoded[row] for row in rows]
    lengths = [len(e.ids) for e in chosen]
    shape = (len(chosen), max(lengths))
    ids = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    typed = chosen[0].types is not None
    types = np.zeros(shape, dtype=np.int64) if typed else None
    for i, (e, n) in enumerate(zip(chosen, lengths, strict=True)):
        ids[i, :n] = e.ids
        mask[i, :n] = 1
        if types is not None and e.types is not None:
            types[i, :n] = e.types
    return Batch(
        rows,
        torch.from_numpy(ids).to(device),
        torch.from_numpy(mask).to(device),
        None if types is None else torch.from_numpy(types).to(device),
        torch.tensor([e.start for e in chosen], device=device),
        torch.tensor(lengths, device=device),
    )


def batches(
    encoded: Sequence[Encoded], *, token_budget: int, device: torch.device
) -> Iterator[Batch]:
    """Yield every sample once, in batches of similar length."""
    lengths = [len(e.ids) for e in encoded]
    for rows in plan(lengths, token_budget=token_budget, cost=pass_cost(device)):
        yield collate(encoded, rows, device=device)


# Shared prompts ----------------------------------------------------------------------------------


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
    splits: bool = False,
    causal: bool = False,
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
    splits : bool
        Whether the model attends to prompts and completions apart.
    causal : bool
        Whether it looks at earlier tokens alone.
    """
    groups, alone = group(encoded) if read is not None else ([], list(range(len(encoded))))
    lone = [encoded[row] for row in alone]
    for batch in batches(lone, token_budget=token_budget, device=device):
        yield replace(batch, rows=[alone[i] for i in batch.rows], causal=causal)
    if read is None or not groups:
        return
    lengths = [encoded[rows[0]].start for rows in groups]
    cost = pass_cost(device)
    planned = plan(lengths, token_budget=token_budget, cost=cost)
    for held in _held(planned, lengths, _HELD * token_budget) if splits else [[p] for p in planned]:
        prefix = join_prefixes(
            [read([encoded[groups[i][0]].ids[: lengths[i]] for i in part]) for part in held]
        )
        chosen = [i for part in held for i in part]
        rows = [row for i in chosen for row in groups[i]]
        owners = [n for n, i in enumerate(chosen) for _ in groups[i]]
        tails = [_tail(encoded[row]) for row in rows]
        room = 512 if splits else max(_SPREAD * token_budget // (prefix.ids.shape[1] + 1), 1)
        sizes = [len(tail.ids) for tail in tails]
        for part in plan(sizes, token_budget=token_budget, max_rows=min(512, room), cost=cost):
            part.sort(key=lambda i: owners[i])  # attention reads a prompt once for a run of rows
            batch = collate(tails, part, device=device)
            yield batch.renumbered(
                [rows[i] for i in part],
                prefix=prefix,
                owners=torch.tensor([owners[i] for i in part], device=device),
            )


def _held(planned: list[list[int]], lengths: list[int], most: int) -> Iterator[list[list[int]]]:
    """Yield batches of prompts that are kept at once: of at most so many tokens, or one batch."""
    found: list[list[int]] = []
    total = 0
    for part in planned:
        size = sum(lengths[i] for i in part)
        if found and total + size > most:
            yield found
            found, total = [], 0
        found.append(part)
        total += size
    if found:
        yield found


def _tail(encoded: Encoded) -> Encoded:
    """Return the completion alone."""
    return Encoded(encoded.ids[encoded.start :], 0)


# Size of a batch ---------------------------------------------------------------------------------


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
        The user's own value, returned as it is.
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
    """Return the fixed cost of a pass on a device, as a share of the budget."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # torch 2.4 does not know
    return _CHEAP if device.type == "cpu" and not has_amx() else PASS_COST


def _power(tokens: float) -> int:
    """Return the largest power of two that is no more than that, or the least budget."""
    return max(1 << max(int(tokens), 1).bit_length() - 1, LEAST)
