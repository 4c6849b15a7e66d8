"""What the tests of trained members share: a few pairs, short texts, a small backbone's options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ensemble_rm import Preferences, Sample, TrunkOptions, load_preferences
from ensemble_rm.demo.data import FILE
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.forward.batching import batches

OPTIONS = TrunkOptions(max_length=32, device="cpu", token_budget=512)
SAMPLES = [Sample("Who are you?", "A fox " * n) for n in (1, 9, 3, 12, 2, 7)]


class Killed(Exception):
    """What a test raises to end a run."""


def few_pairs(n: int) -> tuple[Preferences, ...]:
    """Two parts, to train on and to validate with."""
    return load_preferences(FILE)[:n].split(0.5, 0.25, seed=0)


def check_untouched(
    folder: Path, blocks: int, grow: Callable[[torch.nn.ModuleList], torch.nn.ModuleList]
) -> None:
    """What a member starts from, on the trunk's states, is the whole model."""
    whole = Trunk(locate(folder), OPTIONS)
    trunk = Trunk(locate(folder), OPTIONS, top=whole.depth - blocks)
    branching = Branching(trunk)
    own = grow(trunk.rest)
    for batch in batches(trunk.encoder.encode(SAMPLES), token_budget=128, device=trunk.device):
        with torch.inference_mode():
            states = branching.states(batch)
            assert (states is None) == (blocks == whole.depth)
            found = branching.pooled(own, states, batch, "both", width=2 * trunk.width)
        wanted = whole.pool_batch(batch, [(whole.depth, "last"), (whole.depth, "mean")]).flatten(1)
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-6)
