"""A world whose gold is known exactly, and reward models trained on its noisy pairs.

A completion is a point x of R⁸ from Student's t with 6 degrees of freedom: now and then a sample
lies far from all that was labelled. Gold is w·x − ¼‖x‖²/√8, standardised: more along w is better,
too far is worse. Annotators prefer by Bradley–Terry at twice gold's unit; a share of the labels is
then flipped. Members see 500 pairs and stop at the lowest loss on 100 others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

DIM, FREEDOM, WIDTH, DEPTH = 8, 6, 64, 5
PAIRS, HELD, STEPS, RATE = 600, 100, 300, 3e-3

Score = Callable[[np.ndarray], np.ndarray]


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return n completions, shape (n, 8)."""
    return rng.normal(size=(n, DIM)) / np.sqrt(rng.chisquare(FREEDOM, size=(n, 1)) / FREEDOM)


@dataclass(frozen=True)
class World:
    """One gold, with its labelled pairs."""

    direction: np.ndarray
    centre: float
    scale: float
    chosen: np.ndarray  # (PAIRS, 8)
    rejected: np.ndarray

    def gold(self, x: np.ndarray) -> np.ndarray:
        return (raw_gold(x, self.direction) - self.centre) / self.scale


def raw_gold(x: np.ndarray, direction: np.ndarray) -> np.ndarray:
    return x @ direction - 0.25 * (x**2).sum(axis=1) / np.sqrt(DIM)


def make_world(rng: np.random.Generator, *, flipped: float) -> World:
    direction = rng.normal(size=DIM)
    direction /= np.linalg.norm(direction)
    drawn = raw_gold(draw(rng, 20_000), direction)
    centre, scale = float(drawn.mean()), float(drawn.std())
    first, second = draw(rng, PAIRS), draw(rng, PAIRS)
    margin = (raw_gold(first, direction) - raw_gold(second, direction)) / scale
    wins = rng.random(PAIRS) < 1 / (1 + np.exp(-2 * margin))
    wins ^= rng.random(PAIRS) < flipped
    chosen = np.where(wins[:, None], first, second)
    rejected = np.where(wins[:, None], second, first)
    return World(direction, centre, scale, chosen, rejected)


def fit(
    parameters: list[torch.Tensor],
    reward: Callable[[torch.Tensor], torch.Tensor],
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Train k members at once by AdamW, each kept where its loss on the held pairs is lowest.

    `reward` maps the pairs' inputs to (k, n); each parameter's first axis is the member.
    """
    k, n = weights.shape
    both, train = torch.cat([chosen, rejected], dim=-2), slice(0, n - HELD)
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    lowest = torch.full((k,), torch.inf)
    kept = [p.detach().clone() for p in parameters]
    for step in range(STEPS):
        found = reward(both)
        loss = torch.nn.functional.softplus(found[:, n:] - found[:, :n])  # −log σ of the margin
        held = loss[:, n - HELD :].detach().mean(dim=1)
        better = (held < lowest) & (step > 0)  # heads begin at 0, which says nothing
        lowest = torch.where(better, held, lowest)
        for copy, value in zip(kept, parameters, strict=True):
            copy[better] = value.detach()[better]
        optimiser.zero_grad()
        (loss * weights)[:, train].mean(dim=1).sum().backward()
        optimiser.step()
    with torch.no_grad():
        for copy, value in zip(kept, parameters, strict=True):
            value.copy_(copy)


def mlp_members(world: World, k: int, *, seed: int) -> Score:
    """Return k MLPs with two hidden layers, seeds apart, all trained on all the pairs."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (DIM, WIDTH, WIDTH, 1)
    weights = [
        torch.randn(k, a, b, generator=generator) * (2 / a) ** 0.5 for a, b in pairwise(sizes)
    ]
    biases = [torch.zeros(k, 1, WIDTH) for _ in range(2)]
    parameters = [p.requires_grad_() for p in (*weights, *biases)]

    def reward(x: torch.Tensor) -> torch.Tensor:
        for w, b in zip(weights[:2], biases, strict=True):
            x = torch.relu(x @ w + b)
        return (x @ weights[2])[..., 0]

    chosen, rejected = (torch.tensor(x, dtype=torch.float32) for x in pairs_of(world))
    fit(parameters, reward, chosen, rejected, torch.ones(k, PAIRS))
    return as_score(reward, lambda x: x)


def head_members(world: World, k: int, *, views: bool, seed: int) -> Score:
    """Return k linear heads over one random network, each on a bootstrap of the pairs.

    With `views` head i reads hidden layer i; else every head reads the last one.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for i in range(DEPTH):
        width = DIM if i == 0 else WIDTH
        scaled = torch.randn(width, WIDTH, generator=generator) * (2 / width) ** 0.5
        layers.append((scaled, torch.randn(WIDTH, generator=generator) * 0.5))

    def read(x: torch.Tensor) -> torch.Tensor:
        states = []
        for w, b in layers:
            x = torch.relu(x @ w + b)
            states.append(x)
        return torch.stack([states[i if views else -1] for i in range(k)])  # (k, n, WIDTH)

    chosen, rejected = (read(torch.tensor(x, dtype=torch.float32)) for x in pairs_of(world))
    every = torch.cat([chosen, rejected], dim=1)
    mean, std = every.mean(dim=1, keepdim=True), every.std(dim=1, keepdim=True) + 1e-6
    heads = torch.zeros(k, WIDTH, 1).requires_grad_()

    def reward(x: torch.Tensor) -> torch.Tensor:
        return ((x - mean) / std @ heads)[..., 0]

    rng = np.random.default_rng(seed)
    counts = rng.multinomial(PAIRS - HELD, np.full(PAIRS - HELD, 1 / (PAIRS - HELD)), size=k)
    weights = torch.ones(k, PAIRS)
    weights[:, : PAIRS - HELD] = torch.tensor(counts, dtype=torch.float32)
    fit([heads], reward, chosen, rejected, weights)
    return as_score(reward, read)


def pairs_of(world: World) -> tuple[np.ndarray, np.ndarray]:
    return world.chosen, world.rejected


def as_score(
    reward: Callable[[torch.Tensor], torch.Tensor], read: Callable[[torch.Tensor], torch.Tensor]
) -> Score:
    @torch.no_grad()
    def score(x: np.ndarray) -> np.ndarray:
        parts = torch.tensor(x, dtype=torch.float32).split(20_000)
        return torch.cat([reward(read(part)) for part in parts], dim=1).T.double().numpy()

    return score
