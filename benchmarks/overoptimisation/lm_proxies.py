"""The proxies of `overoptimisation_lm.py`: few-data ensembles on pairs that gold labelled.

Each seed has training prompts of its own, a pair of the policy's samples each. An annotator prefers
by Bradley–Terry at twice gold's unit, its standard deviation within a prompt; in the noisy case a
quarter of those verdicts is then flipped, in validation pairs, too. Every ensemble is kept as a
saved one, under KIND-CASE-seedN; made where it is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared.preference_runs import package_folder
from ensemble_rm import Preference, Preferences, RewardEnsemble, Sample, TrunkOptions, train
from ensemble_rm.members import HeadRecipe

CASES = {"clean": 0.0, "noise": 0.25}
STEEPNESS = 2.0  # of the annotator, a standard deviation of gold
OPTIONS = TrunkOptions(max_length=128, dtype="bfloat16", device="cpu")
LAST = ("30:last",)  # SmolLM2's last layer, last token: what a head reads in today's practice
MIDDLE = ("22:both",)  # the middle one of the five views
ONE_VIEW, MIDDLE_VIEW = HeadRecipe(views=LAST), HeadRecipe(views=MIDDLE)
KINDS: dict[str, dict[str, Any]] = {
    "single": {"backbone": "smollm2", "members": 1, "recipe": ONE_VIEW},
    "heads": {"backbone": "smollm2", "members": 5, "recipe": replace(ONE_VIEW, bootstrap=True)},
    "views": {"backbone": "smollm2", "members": 5},
    "middle_one": {"backbone": "smollm2", "members": 1, "recipe": MIDDLE_VIEW},
    "middle": {"backbone": "smollm2", "members": 5, "recipe": replace(MIDDLE_VIEW, bootstrap=True)},
    "minilm": {"backbone": "minilm", "members": 5},
    "branch": {"backbone": "smollm2", "members": 5, "kind": "branch"},
}


@dataclass(frozen=True)
class Labels:
    """Which pairs proxies learn from.

    Attributes
    ----------
    fit, validation : int
        Pairs of a seed.
    """

    fit: int = 400
    validation: int = 100


def within_unit(gold: np.ndarray) -> float:
    """Return gold's standard deviation within a prompt, of (n_prompts, 2) golds.

    Half of the mean squared difference of two samples is their variance.
    """
    return float(np.sqrt(np.mean((gold[:, 0] - gold[:, 1]) ** 2) / 2))


def first_wins(
    gold: np.ndarray, unit: float, *, flipped: float, rng: np.random.Generator
) -> np.ndarray:
    """Return whether the first of each pair was preferred, (n_pairs,), of (n_pairs, 2) golds.

    With one generator state, cases differ in the flipped verdicts alone.
    """
    margin = STEEPNESS * (gold[:, 0] - gold[:, 1]) / unit
    wins = rng.random(len(gold)) < 1 / (1 + np.exp(-margin))
    return wins ^ (rng.random(len(gold)) < flipped)


def label(
    samples: Sequence[Sample], gold: np.ndarray, *, flipped: float, seed: int, labels: Labels
) -> tuple[Preferences, Preferences]:
    """Return a seed's training and validation pairs.

    Parameters
    ----------
    samples : sequence of Sample
        Two of each training prompt, side by side.
    gold : ndarray, shape (n_samples,)
    flipped : float
        Share of verdicts.
    seed : int
        The first takes the first prompts, and so on.
    labels : Labels
    """
    each = labels.fit + labels.validation
    pairs = gold.reshape(-1, 2)
    own = np.arange(seed * each, (seed + 1) * each)
    wins = first_wins(
        pairs[own], within_unit(pairs), flipped=flipped, rng=np.random.default_rng((seed, 7))
    )
    found = []
    for row, won in zip(own, wins, strict=True):
        first, second = samples[2 * row], samples[2 * row + 1]
        better, worse = (first, second) if won else (second, first)
        found.append(Preference(first.prompt, better.completion, worse.completion))
    return Preferences(tuple(found[: labels.fit])), Preferences(tuple(found[labels.fit :]))


def make_proxy(
    folder: Path,
    kind: str,
    case: str,
    seed: int,
    *,
    samples: Sequence[Sample],
    gold: np.ndarray,
    labels: Labels,
    cache_dir: Path,
) -> RewardEnsemble:
    """Return one ensemble, from its folder or trained now."""
    own = folder / f"{kind}-{case}-seed{seed}"
    if (own / "ensemble.json").exists():
        return RewardEnsemble.from_pretrained(own, device="cpu")
    fit, validation = label(samples, gold, flipped=CASES[case], seed=seed, labels=labels)
    options = dict(KINDS[kind])
    return train(
        fit,
        validation,
        backbone=package_folder(options.pop("backbone")),
        seed=seed,
        options=OPTIONS,
        out=own,
        cache_dir=cache_dir,
        **options,
    )
