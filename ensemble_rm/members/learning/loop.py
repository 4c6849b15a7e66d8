"""The loop of training by gradient steps: epochs, early stopping, checkpoints, resume.

A lane is what stops, and is kept at its best, on its own: a member, or a member under one of the
weight decays that are tried. Knows nothing of heads, branches or how a loss is computed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ensemble_rm.errors import TrainingError
from ensemble_rm.members.learning.checkpoint import (
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.progress import Progress


@dataclass
class LoopState:
    """What a run has reached.

    Attributes
    ----------
    best : dict of str to torch.Tensor
        The trained parameters, each lane's as they were at its lowest validation NLL; on the CPU.
    lowest : torch.Tensor, shape of the lanes
        Lowest validation NLL, in nats; infinite before the first.
    since : torch.Tensor of int, shape of the lanes
        Epochs since then.
    history : list of dict
        One entry per epoch.
    """

    best: dict[str, torch.Tensor]
    lowest: torch.Tensor
    since: torch.Tensor
    history: list[dict[str, Any]] = field(default_factory=list)


class TrainingLoop(ABC):
    """Trains lanes side by side, each until it stops improving on the validation pairs.

    Parameters
    ----------
    recipe : Recipe
        Its epochs, patience and learning rate.
    lanes : tuple of int
        The lanes' shape: (n_members,), or (n_members, n_weight_decays).
    may_stay : bool
        Whether a lane that training cannot better keeps the parameters that it starts with.
    checkpoint : Path, optional
        Folder to resume from and to write to.
    digest : str
        Of all that the run depends on; a checkpoint of another digest is refused.
    """

    # Least time between two checkpoints, which are written after epochs; 0 for one after each.
    checkpoint_seconds = 1.0
    divergence_hint: str  # what else to do where a loss is not finite
    optimiser: torch.optim.Optimizer

    def __init__(
        self,
        recipe: Recipe,
        lanes: tuple[int, ...],
        *,
        may_stay: bool,
        checkpoint: Path | None,
        digest: str,
    ) -> None:
        self.lanes, self.may_stay = lanes, may_stay
        self.checkpoint, self.digest = checkpoint, digest
        self._limits = recipe.epochs, recipe.patience, recipe.learning_rate

    @abstractmethod
    def trained(self) -> dict[str, torch.Tensor]:
        """Return the parameters that the optimiser changes, by name."""

    @abstractmethod
    def train_epoch(self, epoch: int, active: torch.Tensor, progress: Progress) -> torch.Tensor:
        """Take an epoch's steps; return each lane's mean training loss, NaN where it is not active.

        Parameters
        ----------
        epoch : int
        active : torch.Tensor of bool, shape of the lanes
            Lanes that have not stopped.
        progress : callable
        """

    @abstractmethod
    def validation_nll(self, active: torch.Tensor) -> torch.Tensor:
        """Return each lane's validation NLL in nats; that of lanes not active does not count."""

    @abstractmethod
    def keep(self, best: dict[str, torch.Tensor], better: torch.Tensor) -> None:
        """Copy the parameters of the lanes marked in `better` into `best`."""

    def history_entry(
        self,
        epoch: int,
        train: torch.Tensor,
        validation: torch.Tensor,
        active: torch.Tensor,  # noqa: ARG002 - for subclasses
    ) -> dict[str, Any]:
        """Return what the history says of an epoch, as JSON values."""
        return {"epoch": epoch, "train": train.tolist(), "validation": validation.tolist()}

    def run_epochs(self, progress: Progress) -> LoopState:
        """Train to the end, from the checkpoint if there is one; return the best of each lane.

        Raises
        ------
        TrainingError
            If an active lane's loss is NaN or infinite, or the checkpoint belongs to another run.
        """
        epochs, patience, _ = self._limits
        state = self._start()
        due = time.monotonic() + self.checkpoint_seconds
        for epoch in range(len(state.history), epochs):
            active = state.since < patience
            if not active.any():
                break
            train = self.train_epoch(epoch, active, progress).cpu()
            nll = self.validation_nll(active).cpu()
            self._refuse_non_finite(epoch, train, nll, active)
            better = active & (nll < state.lowest)
            state.lowest = torch.where(better, nll, state.lowest)
            state.since = torch.where(better, 0, state.since + 1)
            self.keep(state.best, better)
            state.history.append(self.history_entry(epoch, train, nll, active))
            if self.checkpoint and time.monotonic() >= due:
                began = time.monotonic()
                self._save(self.checkpoint, state)
                due = time.monotonic() + self._pause(time.monotonic() - began)
        if self.checkpoint:
            remove_checkpoint(self.checkpoint)
        return state

    def diverged(self, lane: tuple[int, ...], epoch: int) -> TrainingError:
        """Return the error of a lane whose loss is NaN or infinite."""
        return TrainingError(
            f"the loss of {self.lane_name(lane)} became NaN or infinite in epoch {epoch}; lower "
            f"learning_rate={self._limits[2]}, or {self.divergence_hint}"
        )

    def lane_name(self, lane: tuple[int, ...]) -> str:
        """Return how messages name a lane."""
        return f"member {lane[0]}"

    def _refuse_non_finite(
        self, epoch: int, train: torch.Tensor, nll: torch.Tensor, active: torch.Tensor
    ) -> None:
        bad = active & ~(torch.isfinite(train) & torch.isfinite(nll))
        if bad.any():
            raise self.diverged(tuple(bad.nonzero()[0].tolist()), epoch)

    # Checkpoints -------------------------------------------------------------------------------

    def _pause(self, took: float) -> float:
        """Return the seconds until the next checkpoint: they take at most 5 % of the time."""
        return max(self.checkpoint_seconds, 20 * took) if self.checkpoint_seconds > 0 else 0.0

    def _save(self, folder: Path, state: LoopState) -> None:
        tensors = {"lowest": state.lowest, "since": state.since}
        for name, p in self.trained().items():
            tensors[f"now.{name}"] = p
            tensors[f"best.{name}"] = state.best[name]
            for key, value in self.optimiser.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value
        save_checkpoint(folder, tensors, {"recipe": self.digest, "history": state.history})

    @torch.no_grad()
    def _start(self) -> LoopState:
        """Return the state at the beginning, or the checkpoint's, with its parameters in place."""
        stored = load_checkpoint(self.checkpoint, recipe=self.digest) if self.checkpoint else None
        if stored is None:
            lowest = (
                self.validation_nll(torch.ones(self.lanes, dtype=torch.bool)).cpu()
                if self.may_stay
                else torch.full(self.lanes, float("inf"))
            )
            best = {name: p.detach().cpu().clone() for name, p in self.trained().items()}
            return LoopState(best, lowest, torch.zeros(self.lanes, dtype=torch.long))
        tensors, saved = stored
        for name, p in self.trained().items():
            p.copy_(tensors[f"now.{name}"])
            if f"step.{name}" in tensors:
                self.optimiser.state[p] = {
                    "step": tensors[f"step.{name}"],  # Adam counts its steps on the CPU
                    "exp_avg": tensors[f"exp_avg.{name}"].to(p.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(p.device),
                }
        best = {name: tensors[f"best.{name}"] for name in self.trained()}
        return LoopState(best, tensors["lowest"], tensors["since"], saved["history"])
