"""Trains branches on token states, all at once.

Each member sees the pairs in its own order and under its own dropout, a step's pairs in passes
within the token budget; gradients are clipped in each, and each stops at its own best validation
NLL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_rm.errors import NonFiniteLossError
from ensemble_rm.members.backbone.token_states import TokenStates
from ensemble_rm.members.branches.module import Branch, PairStates
from ensemble_rm.members.branches.recipe import BranchedRecipe
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.forward.batching import plan
from ensemble_rm.members.learning.checkpoint import (
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from ensemble_rm.members.learning.loss import preference_loss
from ensemble_rm.members.learning.seeds import resample_counts
from ensemble_rm.progress import Progress, silent

_BUCKET = 16  # batches that are sorted by length together

Penalty: TypeAlias = Callable[[Sequence[Branch], Sequence[int]], torch.Tensor]
"""A scalar that is minimised with the loss, of all branches and the numbers of the active ones."""


@dataclass
class _Progress:
    """What a run has reached, a member each."""

    best: list[dict[str, torch.Tensor]]
    lowest: torch.Tensor
    since: torch.Tensor
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class BranchesResult:
    """Trained branches.

    Attributes
    ----------
    branches : list of Branch
        At their best.
    validation_nll : tuple of float
        Each member's, raw.
    history : list of dict
        An epoch each: training loss and validation NLL of every member.
    """

    branches: list[Branch]
    validation_nll: tuple[float, ...]
    history: list[dict[str, Any]]


@torch.no_grad()
def branch_scores(branching: Branching, branch: Branch, states: TokenStates) -> NDArray[np.float64]:
    """Score every sample with a member as it is now: (n_samples,)."""
    branch.eval()
    out = np.empty(len(states))
    for rows in plan(states.lengths.tolist(), token_budget=branching.trunk.token_budget):
        out[rows] = branch.scores(branching, states, rows).double().cpu().numpy()
    return out


class BranchTrainer:
    """Trains k branches on token states.

    Parameters
    ----------
    branching : Branching
    fit, validation : PairStates
    branches : list of Branch
        As they start.
    recipe : BranchedRecipe
    seeds : list of dict
        Each member's, by purpose.
    checkpoint : Path, optional
        Folder to resume from and to write to.
    digest : str
        Of all that the run depends on; a checkpoint of another digest is refused.
    may_stay : bool
        Whether a member that training cannot better remains what it started as; else its head is
        nothing yet.
    penalty : callable, optional
        A term that each step minimises with the loss.
    """

    checkpoint_seconds = 1.0  # least time between two checkpoints, written between epochs

    def __init__(
        self,
        branching: Branching,
        fit: PairStates,
        validation: PairStates,
        *,
        branches: list[Branch],
        recipe: BranchedRecipe,
        seeds: list[dict[str, int]],
        checkpoint: Path | None = None,
        digest: str = "",
        may_stay: bool = False,
        penalty: Penalty | None = None,
    ) -> None:
        self.branching, self.fit, self.validation = branching, fit, validation
        self.recipe, self.seeds = recipe, seeds
        self.checkpoint, self.digest = checkpoint, digest
        self.may_stay, self.penalty = may_stay, penalty
        self.device = branching.trunk.device
        self.branches = [branch.to(self.device) for branch in branches]
        counts = resample_counts(fit.pairs.groups, seeds, bootstrap=recipe.bootstrap)
        weights = fit.pairs.weights / fit.pairs.weights.mean()
        self.weights = torch.from_numpy(counts * weights).float()  # (k, n)
        self.targets = torch.from_numpy(fit.pairs.targets).float()
        self.margins = torch.from_numpy(fit.pairs.margins).float()
        lengths = fit.states.lengths
        self.longest = np.maximum(lengths[: len(fit)], lengths[len(fit) :])
        self.steps = -(-len(fit) // recipe.batch_size)
        self.optimiser = self._optimiser()

    def _optimiser(self) -> torch.optim.AdamW:
        """Return AdamW over all members; only matrices decay, heads have their own rate."""
        named = [item for branch in self.branches for item in branch.trained().items()]
        groups: list[dict[str, Any]] = [
            {
                "params": [
                    p
                    for name, p in named
                    if (p.dim() > 1) == matrix and name.startswith("blocks.") != head
                ],
                "weight_decay": self.recipe.weight_decay if matrix else 0.0,
                "scale": self.recipe.head_rate if head else 1.0,
            }
            for matrix in (True, False)
            for head in (True, False)
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.recipe.learning_rate
        )

    def _order(self, member: int, epoch: int) -> list[NDArray[np.int64]]:
        """Return the member's batches of pairs: random, but of similar length within a bucket."""
        rng = np.random.default_rng([self.seeds[member]["order"], epoch])
        n, size = len(self.fit), self.recipe.batch_size
        order = rng.permutation(n)
        found: list[NDArray[np.int64]] = []
        for i in range(0, n, size * _BUCKET):
            bucket = order[i : i + size * _BUCKET]
            bucket = bucket[np.argsort(self.longest[bucket], kind="stable")]
            found += [bucket[j : j + size] for j in range(0, len(bucket), size)]
        return [found[i] for i in rng.permutation(len(found))]

    def _parts(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Cut a step's pairs into passes within the token budget, a pair at least."""
        widest = int(self.longest[rows].max())
        pairs = max(self.branching.trunk.token_budget // (2 * widest), 1)
        return [rows[i : i + pairs] for i in range(0, len(rows), pairs)]

    def _loss(self, member: int, rows: NDArray[np.int64]) -> torch.Tensor:
        """Return the sum of the pairs' losses."""
        n = len(self.fit)
        both = [*rows.tolist(), *(rows + n).tolist()]
        scores = self.branches[member].scores(self.branching, self.fit.states, both)
        losses = preference_loss(
            scores[: len(rows)],
            scores[len(rows) :],
            self.targets[rows].to(self.device),
            margins=self.margins[rows].to(self.device),
            smoothing=self.recipe.smoothing,
            centring=self.recipe.centring,
        )
        return (losses * self.weights[member, rows].to(self.device)).sum()

    def _rate(self, step: int) -> float:
        """Share of the learning rate at a step: a rise, then a straight fall to 0."""
        total = self.steps * self.recipe.epochs
        rise = self.recipe.warmup * total
        return min((step + 1) / max(rise, 1), (total - step) / max(total - rise, 1))

    def _validate(self, active: list[int]) -> torch.Tensor:
        """Return each active member's validation NLL, infinity for the others."""
        pairs, n = self.validation.pairs, len(self.validation)
        found = torch.full((len(self.branches),), float("inf"))
        weights = torch.from_numpy(pairs.weights / pairs.weights.mean())
        for member in active:
            branch = self.branches[member]
            scores = torch.from_numpy(branch_scores(self.branching, branch, self.validation.states))
            losses = preference_loss(scores[:n], scores[n:], torch.from_numpy(pairs.targets))
            found[member] = float((losses * weights).mean())
        return found

    # The loop ----------------------------------------------------------------------------------

    def run(self, *, progress: Progress = silent) -> BranchesResult:
        """Train to the end, from the checkpoint where there is one.

        Raises
        ------
        NonFiniteLossError
            If a member's loss is NaN or infinite.
        ResumeError
            If the checkpoint belongs to another run.
        """
        k, patience = len(self.branches), self.recipe.patience
        reached = _Progress(
            [branch.copied() for branch in self.branches],
            self._validate(list(range(k)) if self.may_stay else []),
            torch.zeros(k, dtype=torch.long),
        )
        self._resume(reached)
        due = time.monotonic() + self.checkpoint_seconds
        for epoch in range(len(reached.history), self.recipe.epochs):
            active = [i for i in range(k) if reached.since[i] < patience]
            if not active:
                break
            train_loss = self._epoch(epoch, active, progress)
            nll = self._validate(active)
            better = nll < reached.lowest
            reached.lowest = torch.where(better, nll, reached.lowest)
            reached.since = torch.where(better, 0, reached.since + 1)
            for member in better.nonzero().flatten().tolist():
                reached.best[member] = self.branches[member].copied()
            reached.history.append(
                {
                    "epoch": epoch,
                    "train": [train_loss.get(i) for i in range(k)],
                    "validation": [float(nll[i]) if i in active else None for i in range(k)],
                }
            )
            if self.checkpoint and time.monotonic() >= due:
                began = time.monotonic()
                self._save(reached)
                now = time.monotonic()
                due = now + max(self.checkpoint_seconds, 20 * (now - began))  # at most 5 % of it
        progress("training", self.recipe.epochs * self.steps, self.recipe.epochs * self.steps)
        for branch, best in zip(self.branches, reached.best, strict=True):
            branch.load_state_dict(best, strict=False)  # what is frozen stands as it was
        if self.checkpoint:
            remove_checkpoint(self.checkpoint)
        nll_of = tuple(reached.lowest.tolist())
        return BranchesResult([b.eval() for b in self.branches], nll_of, reached.history)

    def _epoch(self, epoch: int, active: list[int], progress: Progress) -> dict[int, float]:
        orders = {i: self._order(i, epoch) for i in active}
        totals = dict.fromkeys(active, 0.0)
        devices = [self.device] if self.device.type == "cuda" else []
        for branch in self.branches:
            branch.train()
        for step in range(self.steps):
            at = epoch * self.steps + step
            progress("training", at, self.recipe.epochs * self.steps)
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe.learning_rate * group["scale"] * self._rate(at)
            self.optimiser.zero_grad(set_to_none=True)
            for i in active:
                rows = orders[i][step]
                with torch.random.fork_rng(devices=devices):
                    torch.manual_seed((self.seeds[i]["dropout"] + at) % 2**63)
                    for part in self._parts(rows):
                        loss = self._loss(i, part)
                        self._refuse_nan(loss, i, epoch)
                        totals[i] += loss.item() / len(self.fit)
                        (loss / len(rows)).backward()  # type: ignore[no-untyped-call]
            if self.penalty is not None:
                self.penalty(self.branches, active).backward()  # type: ignore[no-untyped-call]
            for i in active:
                trained = self.branches[i].trained().values()
                torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip)
            self.optimiser.step()
        return totals

    def _refuse_nan(self, loss: torch.Tensor, member: int, epoch: int) -> None:
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss of member {member} became NaN or infinite in epoch {epoch}; lower "
                f"learning_rate={self.recipe.learning_rate}, or take dtype='float32'"
            )

    # Resume ------------------------------------------------------------------------------------

    def _named(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for i, branch in enumerate(self.branches):
            for name, p in branch.trained().items():
                yield f"{i}.{name}", p

    def _save(self, reached: _Progress) -> None:
        assert self.checkpoint is not None
        tensors = {"lowest": reached.lowest, "since": reached.since}
        for name, p in self._named():
            tensors[f"now.{name}"] = p
            for key, value in self.optimiser.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value
        for i, best in enumerate(reached.best):
            tensors |= {f"best.{i}.{name}": value for name, value in best.items()}
        save_checkpoint(
            self.checkpoint, tensors, {"recipe": self.digest, "history": reached.history}
        )

    @torch.no_grad()
    def _resume(self, reached: _Progress) -> None:
        """Fill everything from the checkpoint, where there is one."""
        stored = load_checkpoint(self.checkpoint, recipe=self.digest) if self.checkpoint else None
        if stored is None:
            return
        tensors, state = stored
        reached.lowest, reached.since = tensors["lowest"], tensors["since"]
        reached.history = state["history"]
        for i, best in enumerate(reached.best):
            for name in best:
                best[name] = tensors[f"best.{i}.{name}"]
        for name, p in self._named():
            p.copy_(tensors[f"now.{name}"])
            if f"step.{name}" in tensors:
                self.optimiser.state[p] = {
                    "step": tensors[f"step.{name}"],
                    "exp_avg": tensors[f"exp_avg.{name}"].to(self.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(self.device),
                }
