"""Seeds: one number → independent streams for every member and purpose.

Nothing here changes a global generator, except `global_seed`, which restores it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

PURPOSES = ("init", "order", "bootstrap", "subspace", "dropout")


def member_seeds(seed: int, members: int) -> list[dict[str, int]]:
    """Spawn a seed for each member and purpose: independent streams of numpy's SeedSequence.

    The seeds of member i do not depend on how many members there are.
    """
    seeds = []
    for child in np.random.SeedSequence(seed).spawn(members):
        numbers = child.generate_state(len(PURPOSES), np.uint64)
        seeds.append({p: int(n >> 1) for p, n in zip(PURPOSES, numbers.tolist(), strict=True)})
    return seeds


def resample_counts(
    groups: NDArray[np.int64], seeds: list[dict[str, int]], *, bootstrap: bool
) -> NDArray[np.float64]:
    """Return how often each pair counts for each member: once, or as often as its prompt is drawn.

    Parameters
    ----------
    groups : ndarray of int, shape (n_pairs,)
        Prompt of each pair; the bootstrap draws whole prompts.
    seeds : list of dict
        Each member's seeds, by purpose.
    bootstrap : bool
        Whether prompts are resampled.

    Returns
    -------
    ndarray, shape (n_members, n_pairs)
    """
    if not bootstrap:
        return np.ones((len(seeds), len(groups)))
    labels = np.unique(groups, return_inverse=True)[1]
    size = int(labels.max()) + 1
    counts = [
        np.bincount(
            np.random.default_rng(own["bootstrap"]).integers(size, size=size), minlength=size
        )[labels]
        for own in seeds
    ]
    return np.stack(counts).astype(np.float64)


def subspace_masks(width: int, seeds: list[dict[str, int]], *, share: float) -> NDArray[np.float64]:
    """Draw the features that each member sees: (n_members, width) of zeros and ones."""
    keep = max(1, round(share * width))
    masks = np.zeros((len(seeds), width))
    for row, own in zip(masks, seeds, strict=True):
        row[np.random.default_rng(own["subspace"]).permutation(width)[:keep]] = 1
    return masks


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators, and restore their states at the end.

    For trainers that draw from them; torch's generators of accelerators are included.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
