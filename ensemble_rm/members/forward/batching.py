"""Encoded samples → padded batches of similar length.

Batches are filled to a budget of padded tokens, longest first, so that little is padding and a
lack of memory shows at once. Padding stands on the right whatever the tokenizer prefers; the
mask comes from lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ensemble_rm.members.encoding import Encoded
from ensemble_rm.members.forward.prefix_cache import Prefix
from ensemble_rm.members.forward.token_budget import PASS_COST, pass_cost


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

    Of all ways to cut the sorted rows, the one whose padded tokens, and what each pass costs beside
    them, are fewest: dynamic programming over the places where a group may begin.

    Parameters
    ----------
    lengths : sequence of int
        In tokens.
    token_budget : int
        Padded tokens of a group.
    max_rows : int
        Of a group.
    cost : float
        Of a pass beside its tokens, as a share of the budget; see `pass_cost`.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    widths = np.asarray(lengths, dtype=np.int64)[order]
    n, beside = len(widths), token_budget * cost
    spent, begin = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    low = 0
    for end in range(1, n + 1):
        # A wider first row and more of them only grow a group: its earliest beginning moves on.
        low = max(low, end - max_rows)
        while low < end - 1 and (end - low) * widths[low] > token_budget:
            low += 1
        total = spent[low:end] + np.arange(end - low, 0, -1) * widths[low:end]
        best = int(np.argmin(total))
        spent[end], begin[end] = total[best] + beside, low + best
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
