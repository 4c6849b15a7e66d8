"""The gold of `overoptimisation_lm.py`: a whole MiniLM model, fine-tuned on hh_rlhf.

The proxies read SmolLM2, so that gold shares no feature with them; only `mixed` has heads on
MiniLM, frozen, which gold began from. Kept as a saved ensemble; made where it is missing.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.shared.preference_runs import package_folder
from ensemble_rm import RewardEnsemble, TrunkOptions, load_preferences, train
from ensemble_rm.members import FullRecipe

HELD, TOKENS = 0.05, 128


def make_gold(folder: Path, data: Path, *, pairs: int | None = None) -> RewardEnsemble:
    """Return gold, from its folder or trained now; `pairs` takes the first so many alone."""
    if (folder / "ensemble.json").exists():
        return RewardEnsemble.from_pretrained(folder, device="cpu")
    every = load_preferences(data / "hh_rlhf.jsonl")[:pairs]
    fit, validation = every.split(1 - HELD, HELD, seed=0)
    return train(
        fit,
        validation,
        backbone=package_folder("minilm"),
        members=1,
        recipe=FullRecipe(epochs=2 if pairs is None else 1, learning_rate=5e-5),
        options=TrunkOptions(max_length=TOKENS, dtype="bfloat16", device="cpu"),
        out=folder,
        progress=lambda stage, n, of: (
            print(f"{stage} {n}/{of}", flush=True) if n % 25 == 0 else None
        ),
    )
