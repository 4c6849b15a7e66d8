"""Trains branches on token states, all at once.

Each member sees the pairs in its own order and under its own dropout, a step's pairs in passes
within the token budget; gradients are clipped in each, and each stops at its own best validation
NLL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_rm.members.backbone.token_states import TokenStates
from ensemble_rm.members.branches.module import Branch, PairStates
from ensemble_rm.members.branches.recipe import BranchedRecipe
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.forward.batching import plan
from ensemble_rm.members.learning.loop import TrainingLoop
from ensemble_rm.members.learning.loss import preference_loss
from ensemble_rm.members.learning.seeds import resample_counts
from ensemble_rm.progress import Progress, silent

_BUCKET = 16  # batches whose pairs are sorted by length together

Penalty: TypeAlias = Callable[[Sequence[Branch], Sequence[int]], torch.Tensor]
"""A scalar that is minimised with the loss, of all branches and the numbers of the active ones."""


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
    # No dropout while scoring.
    branch.eval()
    out = np.empty(len(states))
    for rows in plan(states.lengths.tolist(), token_budget=branching.trunk.token_budget):
        out[rows] = branch.scores(branching, states, rows).double().cpu().numpy()
    return out


class BranchTrainer(TrainingLoop):
    """Trains k branches on token states.

    Parameters
    ----------
    branching : Branching
    fit, validation : PairStates
    branches : list of Branch
        The members before training.
    recipe : BranchedRecipe
    seeds : list of dict
        Each member's, by purpose.
    checkpoint : Path, optional
        Folder to resume from and to write to.
    digest : str
        Of all that the run depends on; a checkpoint of another digest is refused.
    may_stay : bool
        Whether a member that training cannot better keeps what it starts with.
    penalty : callable, optional
        A term that each step minimises with the loss.
    """

    divergence_hint = "take dtype='float32'"

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
        super().__init__(
            recipe, (len(branches),), may_stay=may_stay, checkpoint=checkpoint, digest=digest
        )
        self.branching, self.fit, self.validation = branching, fit, validation
        self.recipe, self.seeds = recipe, seeds
        self.penalty = penalty
        self.device = branching.trunk.device
        self.branches = [branch.to(self.device) for branch in branches]
        counts = resample_counts(fit.pairs.groups, seeds, bootstrap=recipe.bootstrap)
        weights = fit.pairs.weights / fit.pairs.weights.mean()
        self.weights = torch.from_numpy(counts * weights).float()  # (k, n)
        self.targets = torch.from_numpy(fit.pairs.targets).float()
        self.margins = torch.from_numpy(fit.pairs.margins).float()
        lengths = fit.states.lengths
        # A pair costs as much as its longer side.
        self.longest = np.maximum(lengths[: len(fit)], lengths[len(fit) :])
        # Rounded up: the last batch may be smaller.
        self.steps = -(-len(fit) // recipe.batch_size)
        self.optimiser = self._optimiser()

    def _optimiser(self) -> torch.optim.AdamW:
        """Return AdamW over all members; only matrices decay, heads have their own rate."""
        named = [item for branch in self.branches for item in branch.trained().items()]
        groups: list[dict[str, Any]] = [
            {
                "params": [
                    p
                    # Biases and norms do not decay; heads, which begin at 0, learn at a rate of
                    # their own.
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
        # By epoch, not by the generator's state: a resumed run draws the same batches.
        rng = np.random.default_rng([self.seeds[member]["order"], epoch])
        n, size = len(self.fit), self.recipe.batch_size
        order = rng.permutation(n)
        batches: list[NDArray[np.int64]] = []
        # Sorted within some batches only: full sorting would fix which pairs meet.
        for i in range(0, n, size * _BUCKET):
            bucket = order[i : i + size * _BUCKET]
            bucket = bucket[np.argsort(self.longest[bucket], kind="stable")]
            batches += [bucket[j : j + size] for j in range(0, len(bucket), size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _parts(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Split a step's pairs into passes within the token budget, of at least one pair."""
        widest = int(self.longest[rows].max())
        # Two sides per pair.
        pairs = max(self.branching.trunk.token_budget // (2 * widest), 1)
        return [rows[i : i + pairs] for i in range(0, len(rows), pairs)]

    def _loss(self, member: int, rows: NDArray[np.int64]) -> torch.Tensor:
        """Return the sum of the pairs' losses."""
        n = len(self.fit)
        # Chosen rows are 0 to n−1, rejected ones n to 2n−1.
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
        """Return the share of the learning rate at a step: it rises, then falls to 0 linearly."""
        total = self.steps * self.recipe.epochs
        rise = self.recipe.warmup * total
        return min((step + 1) / max(rise, 1), (total - step) / max(total - rise, 1))

    def validation_nll(self, active: torch.Tensor) -> torch.Tensor:
        """Return each active member's validation NLL, infinity for the others."""
        pairs, n = self.validation.pairs, len(self.validation)
        nll = torch.full((len(self.branches),), float("inf"))
        weights = torch.from_numpy(pairs.weights / pairs.weights.mean())
        for member in _numbers(active):
            branch = self.branches[member]
            scores = torch.from_numpy(branch_scores(self.branching, branch, self.validation.states))
            losses = preference_loss(scores[:n], scores[n:], torch.from_numpy(pairs.targets))
            nll[member] = float((losses * weights).mean())
        return nll

    # The loop ----------------------------------------------------------------------------------

    def run(self, *, progress: Progress = silent) -> BranchesResult:
        """Train to the end, from the checkpoint if there is one.

        Raises
        ------
        TrainingError
            If a member's loss is NaN or infinite.
            If the checkpoint belongs to another run.
        """
        state = self.run_epochs(progress)
        steps = self.recipe.epochs * self.steps
        progress("training", steps, steps)
        for i, branch in enumerate(self.branches):
            # Early stopping keeps the epoch with the lowest validation NLL of each member.
            best = {name: state.best[f"{i}.{name}"] for name in branch.trained()}
            branch.load_state_dict(best, strict=False)  # what is frozen has not changed
        return BranchesResult(
            [branch.eval() for branch in self.branches], tuple(state.lowest.tolist()), state.history
        )

    def trained(self) -> dict[str, torch.Tensor]:
        """Return what is trained of each member, its number before the name."""
        return {
            f"{i}.{name}": p
            for i, branch in enumerate(self.branches)
            for name, p in branch.trained().items()
        }

    def keep(self, best: dict[str, torch.Tensor], better: torch.Tensor) -> None:
        """Copy the better members' parameters."""
        for i in _numbers(better):
            for name, p in self.branches[i].trained().items():
                best[f"{i}.{name}"] = p.detach().cpu().clone()

    def history_entry(
        self, epoch: int, train: torch.Tensor, validation: torch.Tensor, active: torch.Tensor
    ) -> dict[str, Any]:
        """Return both losses; None of members that had stopped."""
        running = active.tolist()
        return {"epoch": epoch} | {
            name: [x if on else None for x, on in zip(losses.tolist(), running, strict=True)]
            for name, losses in (("train", train), ("validation", validation))
        }

    def train_epoch(self, epoch: int, active: torch.Tensor, progress: Progress) -> torch.Tensor:
        """Take an epoch's steps with the active members."""
        members = _numbers(active)
        orders = {i: self._order(i, epoch) for i in members}
        # NaN marks members that have stopped.
        totals = torch.full(self.lanes, float("nan"), dtype=torch.float64)
        totals[active] = 0.0
        devices = [self.device] if self.device.type == "cuda" else []
        for branch in self.branches:
            branch.train()
        for step in range(self.steps):
            at = epoch * self.steps + step
            progress("training", at, self.recipe.epochs * self.steps)
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe.learning_rate * group["scale"] * self._rate(at)
            self.optimiser.zero_grad(set_to_none=True)
            for i in members:
                rows = orders[i][step]
                # Each member's dropout has its own seed, whatever the other members do.
                with torch.random.fork_rng(devices=devices):
                    torch.manual_seed((self.seeds[i]["dropout"] + at) % 2**63)
                    # Gradients add up over the parts, as if the batch were one.
                    for part in self._parts(rows):
                        loss = self._loss(i, part)
                        if not torch.isfinite(loss):
                            raise self.diverged((i,), epoch)
                        totals[i] += loss.item() / len(self.fit)
                        # Divided by the whole batch, not by the part.
                        (loss / len(rows)).backward()  # type: ignore[no-untyped-call]
            if self.penalty is not None:
                self.penalty(self.branches, members).backward()  # type: ignore[no-untyped-call]
            # Per member: one member's large gradient must not shrink the others' steps.
            for i in members:
                trained = self.branches[i].trained().values()
                torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip)
            self.optimiser.step()
        return totals


def _numbers(lanes: torch.Tensor) -> list[int]:
    """Return the numbers of the members that are marked."""
    numbers: list[int] = lanes.nonzero().flatten().tolist()
    return numbers
