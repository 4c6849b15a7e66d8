"""Heads over cached features by Adam: all members and all weight decays are trained at once.

A lane is one member under one weight decay. Lanes share nothing but the arithmetic: losses are
summed over them, gradients are clipped in each, and each stops at its own best validation NLL. A
member keeps its best lane.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import silu

from ensemble_rm.members.heads.recipe import HeadRecipe
from ensemble_rm.members.heads.weights import HeadsResult, HeadWeights, PairFeatures
from ensemble_rm.members.learning.loop import LoopState, TrainingLoop
from ensemble_rm.members.learning.loss import preference_loss
from ensemble_rm.members.learning.seeds import resample_counts, subspace_masks
from ensemble_rm.progress import Progress, silent

_INIT = 0.1  # of 1/√width: members start apart, and the noise does not outlive training


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


class HeadTrainer(TrainingLoop):
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
        Heads to continue from; their standardisation and subspaces are kept.
    checkpoint : Path, optional
        Folder to resume from and to write to.
    digest : str
        Of all that the run depends on; a checkpoint of another digest is refused.
    """

    divergence_hint = "look for non-finite features"

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
    ) -> None:
        self.k, self.g, self.n = len(view_of), len(recipe.weight_decay), len(fit)
        super().__init__(
            recipe,
            (self.k, self.g),
            may_stay=start is not None,
            checkpoint=checkpoint,
            digest=digest,
        )
        self.recipe, self.device = recipe, device
        self.view_of, self.seeds = view_of, seeds
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
        self.optimiser = torch.optim.Adam(list(self.parameters.values()), lr=recipe.learning_rate)

    def _take_scaling(self, start: HeadWeights) -> NDArray[np.float64]:
        """Standardise as the heads to continue from do; return their subspaces."""
        for member, view in enumerate(self.view_of):
            gain = start.gain[member]
            self.offset[view] = start.offset[member]
            # Heads of one view share a gain, except for the features that each leaves out.
            self.gain[view] = np.where(gain != 0, gain, self.gain[view])
        masks: NDArray[np.float64] = (start.gain != 0).astype(np.float64)
        return masks

    def _initial(self) -> dict[str, torch.Tensor]:
        """Draw each member's weights, or take those to continue from; its lanes start alike."""
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
        start = torch.from_numpy(values).float().to(self.device)
        return start[:, None].expand(self.k, self.g, *start.shape[1:]).clone().requires_grad_()

    # Arithmetic --------------------------------------------------------------------------------

    def _scores(self, x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
        """Score (k, B, width) standardised features in every lane: (k, g, B)."""
        x = x * self.mask[:, None]
        if "inner" in p:
            h = silu(torch.einsum("kbd,kgdh->kgbh", x, p["inner"]) + p["inner_bias"][:, :, None])
            return torch.einsum("kgbh,kgh->kgb", h, p["weight"]) + p["bias"][..., None]
        return torch.einsum("kbd,kgd->kgb", x, p["weight"]) + p["bias"][..., None]

    def _losses(self, side: _Side, rows: torch.Tensor | None, *, plain: bool) -> torch.Tensor:
        """Return (k, g) mean losses over (k, B) rows; over all rows if None.

        `plain` leaves out margins, smoothing, centring and resampling.
        """
        views = self.view_of
        if rows is None:
            rows = torch.arange(side.targets.shape[0], device=self.device).expand(self.k, -1)
        chosen, rejected = (
            torch.stack([half[v][r] for v, r in zip(views, rows, strict=True)])
            for half in (side.chosen, side.rejected)
        )
        p = self.parameters
        weights = side.weights[rows]
        if not plain:
            weights = weights * torch.gather(self.counts, 1, rows)
        losses = preference_loss(
            self._scores(chosen, p),
            self._scores(rejected, p),
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
        """Return linear heads of weight 0 on standardised features."""
        gain = self.gain[self.view_of] * self.mask.double().cpu().numpy()
        zeros = np.zeros((self.k, self.width))
        return HeadWeights(self.offset[self.view_of], gain, zeros, np.zeros(self.k))

    def run(self, *, progress: Progress = silent) -> HeadsResult:
        """Train to the end, from the checkpoint if there is one.

        Raises
        ------
        TrainingError
            If a member's loss is NaN or infinite.
            If the checkpoint belongs to another run.
        """
        state = self.run_epochs(progress)
        progress("training", self.recipe.epochs, self.recipe.epochs)
        return self._result(state)

    def trained(self) -> dict[str, torch.Tensor]:
        """Return the heads' parameters, of shape (n_members, n_weight_decays, …)."""
        return self.parameters

    def train_epoch(
        self,
        epoch: int,
        active: torch.Tensor,  # noqa: ARG002 - stopped lanes cost nothing extra
        progress: Progress,
    ) -> torch.Tensor:
        """Take an epoch's steps in all lanes."""
        progress("training", epoch, self.recipe.epochs)
        orders = np.stack(
            [np.random.default_rng([s["order"], epoch]).permutation(self.n) for s in self.seeds]
        )
        order = torch.from_numpy(orders).to(self.device)
        total = torch.zeros(self.k, self.g, device=self.device)
        size = self.recipe.batch_size
        for i in range(0, self.n, size):
            rows = order[:, i : i + size]
            self.optimiser.zero_grad(set_to_none=True)
            losses = self._losses(self.fit, rows, plain=False)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            self._clip()
            self._shrink()
            self.optimiser.step()
            total += losses.detach() * rows.shape[1]
        return total / self.n

    @torch.no_grad()
    def validation_nll(self, active: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - as above
        """Return every lane's validation NLL."""
        return self._losses(self.validation, None, plain=True)

    def keep(self, best: dict[str, torch.Tensor], better: torch.Tensor) -> None:
        """Copy the better lanes' parameters."""
        for name, p in self.parameters.items():
            best[name][better] = p.detach().cpu()[better]

    def lane_name(self, lane: tuple[int, ...]) -> str:
        """Return the member and its weight decay."""
        return f"member {lane[0]} (weight_decay={self.recipe.weight_decay[lane[1]]})"

    def _result(self, state: LoopState) -> HeadsResult:
        """Return each member's best lane."""
        lanes = state.lowest.argmin(dim=1).tolist()
        kept = {
            name: np.stack([p[i, lane].double().numpy() for i, lane in enumerate(lanes)])
            for name, p in state.best.items()
        }
        mask = self.mask.double().cpu().numpy()
        weights = HeadWeights(self.offset[self.view_of], self.gain[self.view_of] * mask, **kept)
        chosen = [
            {
                "epoch": entry["epoch"],
                "train": [entry["train"][i][lane] for i, lane in enumerate(lanes)],
                "validation": [entry["validation"][i][lane] for i, lane in enumerate(lanes)],
            }
            for entry in state.history
        ]
        nll = tuple(float(state.lowest[i, lane]) for i, lane in enumerate(lanes))
        decay = tuple(self.recipe.weight_decay[lane] for lane in lanes)
        return HeadsResult(weights, decay, nll, chosen)
