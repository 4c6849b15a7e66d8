"""Heads over cached features by Adam: all members and all weight decays are trained at once.

A lane is one member under one weight decay. Lanes share nothing but the arithmetic: losses are
summed over them, gradients are clipped in each, and each stops at its own best validation NLL. A
member keeps its best lane.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import silu

from ensemble_rm.errors import NonFiniteLossError
from ensemble_rm.members.heads.recipe import HeadRecipe
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.learning.checkpoint import (
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from ensemble_rm.members.learning.loss import preference_loss
from ensemble_rm.members.learning.seeds import resample_counts, subspace_masks
from ensemble_rm.progress import Progress, silent

_INIT = 0.1  # of 1/√width: members start apart, and the noise does not outlive training


@dataclass(frozen=True)
class PairFeatures:
    """Features and verdicts of preference pairs.

    Attributes
    ----------
    features : ndarray, shape (2·n_pairs, n_views, width)
        Every chosen sample, then every rejected one.
    targets, weights, margins : ndarray, shape (n_pairs,)
    groups : ndarray of int, shape (n_pairs,)
        Prompt of each pair.
    """

    features: NDArray[np.float32]
    targets: NDArray[np.float64]
    weights: NDArray[np.float64]
    margins: NDArray[np.float64]
    groups: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class HeadsResult:
    """Trained heads.

    Attributes
    ----------
    weights : HeadWeights
    chosen : tuple of float
        The weight decay, or the prior, that each member chose.
    validation_nll : tuple of float
        Each member's, raw.
    history : list of dict
        An epoch each, the training loss and validation NLL of every member's chosen lane; or a
        prior each, the validation NLL of every member.
    """

    weights: HeadWeights
    chosen: tuple[float, ...]
    validation_nll: tuple[float, ...]
    history: list[dict[str, Any]] = field(default_factory=list)


class _Side:
    """One part of the data on the device: standardised features by view, and verdicts."""

    def __init__(
        self, data: PairFeatures, offset: torch.Tensor, gain: torch.Tensor, device: torch.device
    ) -> None:
        x = torch.from_numpy(np.ascontiguousarray(data.features.transpose(1, 0, 2))).to(device)
        x = (x - offset[:, None]) * gain[:, None]  # (n_views, 2n, width)
        self.chosen, self.rejected = x[:, : len(data)], x[:, len(data) :]
        self.targets, self.weights, self.margins = (
            torch.from_numpy(a).float().to(device)
            for a in (data.targets, data.weights / data.weights.mean(), data.margins)
        )


class HeadTrainer:
    """Trains k heads on pooled features.

    Parameters
    ----------
    fit, validation : PairFeatures
    view_of : sequence of int
        Which of the features' views each member reads.
    recipe : HeadRecipe
    seeds : list of dict
        Each member's, by purpose: `member_seeds`.
    device : torch.device
    start : HeadWeights, optional
        Where the heads go on from, their standardisation and subspaces included.
    checkpoint : Path, optional
        Folder to resume from and to write to.
    digest : str
        Of all that the run depends on; a checkpoint of another digest is refused.
    checkpoint_seconds : float
        Least time between two checkpoints.
    """

    def __init__(
        self,
        fit: PairFeatures,
        validation: PairFeatures,
        *,
        view_of: list[int],
        recipe: HeadRecipe,
        seeds: list[dict[str, int]],
        device: torch.device,
        start: HeadWeights | None = None,
        checkpoint: Path | None = None,
        digest: str = "",
        checkpoint_seconds: float = 5.0,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.checkpoint, self.digest = checkpoint, digest
        self.checkpoint_seconds = checkpoint_seconds
        self.view_of = view_of
        self.seeds = seeds
        self.k, self.g, self.n = len(view_of), len(recipe.weight_decay), len(fit)
        self.width = fit.features.shape[2]
        used = fit.features.astype(np.float64)
        spread = used.std(axis=0)
        self.offset = used.mean(axis=0)  # (n_views, width)
        self.gain = np.where(spread > 1e-8 * (1 + np.abs(self.offset)), 1 / (spread + 1e-12), 0.0)
        masks = subspace_masks(self.width, seeds, share=recipe.subspace)
        self.start = start
        if start is not None:
            masks = self._take_scaling(start)
        offset, gain = (torch.from_numpy(a).float().to(device) for a in (self.offset, self.gain))
        self.fit = _Side(fit, offset, gain, device)
        self.validation = _Side(validation, offset, gain, device)
        self.mask = torch.from_numpy(masks).float().to(device)  # (k, width)
        counts = resample_counts(fit.groups, self.seeds, bootstrap=recipe.bootstrap)
        self.counts = torch.from_numpy(counts).float().to(device)  # (k, n)
        self.decay = torch.tensor(recipe.weight_decay, device=device)
        self.parameters = self._initial()

    def _take_scaling(self, start: HeadWeights) -> NDArray[np.float64]:
        """Standardise as the heads did that these go on from; return their subspaces."""
        for member, view in enumerate(self.view_of):
            gain = start.gain[member]
            self.offset[view] = start.offset[member]
            # Heads of one view have one gain, but for the features that each leaves out.
            self.gain[view] = np.where(gain != 0, gain, self.gain[view])
        masks: NDArray[np.float64] = (start.gain != 0).astype(np.float64)
        return masks

    def _initial(self) -> dict[str, torch.Tensor]:
        """Draw each member's weights, or take those that it goes on from; its lanes start alike."""
        if self.start is not None:
            kept = ("weight", "bias", "inner", "inner_bias")
            tensors = self.start.tensors()
            return {name: self._lanes(tensors[name]) for name in kept if name in tensors}
        hidden = self.recipe.hidden
        drawn: dict[str, list[NDArray[np.float64]]] = {}
        for seeds in self.seeds:
            rng = np.random.default_rng(seeds["init"])
            own: dict[str, NDArray[np.float64]] = {}
            if hidden:
                own["inner"] = rng.normal(0, self.width**-0.5, (self.width, hidden))
                own["inner_bias"] = np.zeros(hidden)
                own["weight"] = rng.normal(0, _INIT * hidden**-0.5, hidden)
            else:
                own["weight"] = rng.normal(0, _INIT * self.width**-0.5, self.width)
            own["bias"] = np.zeros(())
            for name, value in own.items():
                drawn.setdefault(name, []).append(value)
        return {name: self._lanes(np.stack(values)) for name, values in drawn.items()}

    def _lanes(self, values: NDArray[np.float64]) -> torch.Tensor:
        one = torch.from_numpy(values).float().to(self.device)
        return one[:, None].expand(self.k, self.g, *one.shape[1:]).clone().requires_grad_()

    # Arithmetic --------------------------------------------------------------------------------

    def _scores(self, x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        """Score (k, B, width) standardised features in every lane: (k, g, B)."""
        x = x * self.mask[:, None]
        if "inner" in p:
            h = silu(torch.einsum("kbd,kgdh->kgbh", x, p["inner"]) + p["inner_bias"][:, :, None])
            return torch.einsum("kgbh,kgh->kgb", h, p["weight"]) + p["bias"][..., None]
        return torch.einsum("kbd,kgd->kgb", x, p["weight"]) + p["bias"][..., None]

    def _losses(self, side: _Side, rows: torch.Tensor | None, *, plain: bool) -> torch.Tensor:
        """Return (k, g) mean losses over (k, B) rows; over all, unweighted extras off, if None."""
        views = self.view_of
        if rows is None:
            rows = torch.arange(side.targets.shape[0], device=self.device).expand(self.k, -1)
        one, two = (
            torch.stack([half[v][r] for v, r in zip(views, rows, strict=True)])
            for half in (side.chosen, side.rejected)
        )
        p = self.parameters
        weights = side.weights[rows]
        if not plain:
            weights = weights * torch.gather(self.counts, 1, rows)
        losses = preference_loss(
            self._scores(one, p),
            self._scores(two, p),
            side.targets[rows][:, None],
            margins=0.0 if plain else side.margins[rows][:, None],
            smoothing=0.0 if plain else self.recipe.smoothing,
            centring=0.0 if plain else self.recipe.centring,
        )
        return (losses * weights[:, None]).mean(dim=2)

    @torch.no_grad()
    def _clip(self) -> None:
        """Scale each lane's gradient to at most `clip`."""
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.stack([g.flatten(2).square().sum(2) if g.dim() > 2 else g**2 for g in grads])
        factor = (self.recipe.clip / (norm.sum(0).sqrt() + 1e-12)).clamp(max=1.0)  # (k, g)
        for g in grads:
            g.mul_(factor.reshape(self.k, self.g, *(1,) * (g.dim() - 2)))

    @torch.no_grad()
    def _shrink(self) -> None:
        """Decay the weights, decoupled from the gradient; biases are left alone."""
        for name in ("weight", "inner"):
            if name in self.parameters:
                p = self.parameters[name]
                share = (1 - self.recipe.learning_rate * self.decay).clamp(min=0)
                p.mul_(share.reshape(1, self.g, *(1,) * (p.dim() - 2)))

    # The loop ----------------------------------------------------------------------------------

    def untrained(self) -> HeadWeights:
        """Return linear heads that score nothing yet, on standardised features."""
        gain = self.gain[self.view_of] * self.mask.double().cpu().numpy()
        zeros = np.zeros((self.k, self.width))
        return HeadWeights(self.offset[self.view_of], gain, zeros, np.zeros(self.k))

    def run(self, *, progress: Progress = silent) -> HeadsResult:
        """Train to the end, from the checkpoint where there is one.

        Raises
        ------
        NonFiniteLossError
            If a member's loss is NaN or infinite.
        ResumeError
            If the checkpoint belongs to another run.
        """
        recipe = self.recipe
        optimiser = torch.optim.Adam(list(self.parameters.values()), lr=recipe.learning_rate)
        best = {name: p.detach().clone() for name, p in self.parameters.items()}
        lowest = torch.full((self.k, self.g), float("inf"), device=self.device)
        if self.start is not None:  # where a member may stay
            with torch.no_grad():
                lowest = self._losses(self.validation, None, plain=True)
        since = torch.zeros(self.k, self.g, dtype=torch.long, device=self.device)
        history: list[dict[str, Any]] = []
        start = self._resume(optimiser, best, lowest, since, history)
        saved = time.monotonic()
        for epoch in range(start, recipe.epochs):
            progress("training", epoch, recipe.epochs)
            train_loss = self._epoch(optimiser, epoch)
            with torch.no_grad():
                nll = self._losses(self.validation, None, plain=True)
            self._refuse_nan(train_loss, nll, epoch)
            better = (nll < lowest) & (since < recipe.patience)
            lowest = torch.where(better, nll, lowest)
            since = torch.where(better, torch.zeros_like(since), since + 1)
            with torch.no_grad():
                for name, p in self.parameters.items():
                    best[name][better] = p[better]
            history.append(
                {"epoch": epoch, "train": train_loss.tolist(), "validation": nll.tolist()}
            )
            if bool((since >= recipe.patience).all()):
                break
            if self.checkpoint and time.monotonic() - saved >= self.checkpoint_seconds:
                self._save(optimiser, best, lowest, since, history)
                saved = time.monotonic()
        progress("training", recipe.epochs, recipe.epochs)
        if self.checkpoint:
            remove_checkpoint(self.checkpoint)
        return self._result(best, lowest, history)

    def _epoch(self, optimiser: torch.optim.Optimizer, epoch: int) -> torch.Tensor:
        orders = np.stack(
            [np.random.default_rng([s["order"], epoch]).permutation(self.n) for s in self.seeds]
        )
        order = torch.from_numpy(orders).to(self.device)
        total = torch.zeros(self.k, self.g, device=self.device)
        size = self.recipe.batch_size
        for i in range(0, self.n, size):
            rows = order[:, i : i + size]
            optimiser.zero_grad(set_to_none=True)
            losses = self._losses(self.fit, rows, plain=False)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self._clip()
            self._shrink()
            optimiser.step()
            total += losses.detach() * rows.shape[1]
        return total / self.n

    def _refuse_nan(self, train_loss: torch.Tensor, nll: torch.Tensor, epoch: int) -> None:
        bad = ~(torch.isfinite(train_loss) & torch.isfinite(nll))
        if bad.any():
            member, lane = (int(i) for i in bad.nonzero()[0])
            raise NonFiniteLossError(
                f"the loss of member {member} (weight_decay={self.recipe.weight_decay[lane]}) "
                f"became NaN or infinite in epoch {epoch}; lower learning_rate="
                f"{self.recipe.learning_rate}, or look for non-finite features"
            )

    def _result(
        self, best: dict[str, torch.Tensor], lowest: torch.Tensor, history: list[dict[str, Any]]
    ) -> HeadsResult:
        lanes = lowest.argmin(dim=1).tolist()
        kept = {
            name: np.stack([p[i, lane].double().cpu().numpy() for i, lane in enumerate(lanes)])
            for name, p in best.items()
        }
        mask = self.mask.double().cpu().numpy()
        weights = HeadWeights(self.offset[self.view_of], self.gain[self.view_of] * mask, **kept)
        chosen = [
            {
                "epoch": entry["epoch"],
                "train": [entry["train"][i][lane] for i, lane in enumerate(lanes)],
                "validation": [entry["validation"][i][lane] for i, lane in enumerate(lanes)],
            }
            for entry in history
        ]
        nll = tuple(float(lowest[i, lane]) for i, lane in enumerate(lanes))
        decay = tuple(self.recipe.weight_decay[lane] for lane in lanes)
        return HeadsResult(weights, decay, nll, chosen)

    # Resume ------------------------------------------------------------------------------------

    def _save(
        self,
        optimiser: torch.optim.Optimizer,
        best: dict[str, torch.Tensor],
        lowest: torch.Tensor,
        since: torch.Tensor,
        history: list[dict[str, Any]],
    ) -> None:
        assert self.checkpoint is not None
        tensors = {"lowest": lowest, "since": since}
        for name, p in self.parameters.items():
            tensors[f"now.{name}"] = p
            tensors[f"best.{name}"] = best[name]
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{key}.{name}"] = optimiser.state[p][key]
        save_checkpoint(self.checkpoint, tensors, {"recipe": self.digest, "history": history})

    def _resume(
        self,
        optimiser: torch.optim.Optimizer,
        best: dict[str, torch.Tensor],
        lowest: torch.Tensor,
        since: torch.Tensor,
        history: list[dict[str, Any]],
    ) -> int:
        """Fill everything from the checkpoint; return the epoch to go on with."""
        stored = load_checkpoint(self.checkpoint, recipe=self.digest) if self.checkpoint else None
        if stored is None:
            return 0
        tensors, state = stored
        with torch.no_grad():
            lowest.copy_(tensors["lowest"])
            since.copy_(tensors["since"])
            for name, p in self.parameters.items():
                p.copy_(tensors[f"now.{name}"])
                best[name].copy_(tensors[f"best.{name}"])
                optimiser.state[p] = {
                    key: tensors[f"{key}.{name}"].to(
                        self.device if key != "step" else torch.device("cpu")
                    )
                    for key in ("exp_avg", "exp_avg_sq", "step")
                }
        history += state["history"]
        return len(history)
