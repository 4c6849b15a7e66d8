"""Encoded samples → batches that share their prompts: each sample once, each prompt once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ensemble_rm.members.encoding import Encoded
from ensemble_rm.members.forward.batching import Batch, batches, collate, plan
from ensemble_rm.members.forward.prefix_cache import Prefix, joined
from ensemble_rm.members.forward.token_budget import pass_cost

MIN_SAVED = 16  # tokens; sharing less than this in a group costs more than it saves
_SPREAD = 4  # budgets that the expanded caches of one batch may hold
_HELD = 4  # budgets of prompts that are kept at once, where their caches need not be expanded


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
        prefix = joined(
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
