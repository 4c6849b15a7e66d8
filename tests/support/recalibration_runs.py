"""What the tests of recalibration share: stores of judgments with a planted temperature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_rm import FunctionScorer, RewardEnsemble, Sample
from ensemble_rm.aggregation import Aggregator, mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.calibration.calibration import fit_calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.evidence.dated_margins import DAY, DatedMargins
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore

START = datetime(2026, 1, 1, tzinfo=UTC)
SPREAD = 2.0  # of a margin


def margins(
    t: float, n: int, *, seed: int, days: float = 180.0, start: float = 0.0, coins: bool = False
) -> DatedMargins:
    """Judgments of n prompts over some days, their true temperature t; or the fall of coins."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, SPREAD, n)
    p = np.full(n, 0.5) if coins else 1 / (1 + np.exp(-x / t))
    return DatedMargins(
        x,
        np.column_stack([x + rng.normal(0, 0.3, n), x + rng.normal(0, 0.3, n)]),
        (rng.random(n) < p).astype(float),
        np.ones(n),
        rng.integers(-(2**62), 2**62, n),
        np.sort(start + rng.random(n) * days) * DAY,
        np.full(n, -1, np.int32),
    )


def together(*parts: DatedMargins) -> DatedMargins:
    """All of them, in their order."""
    names = ("margins", "member_margins", "targets", "weights", "groups", "times", "subsets")
    joined: Any = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
    return DatedMargins(*joined)


def score_of(sample: Sample) -> float:
    """A score that stands in the text: a function's member needs no model."""
    return float(sample.completion.split()[-1])


def judged(
    t: float, n: int, *, seed: int, days: float = 180.0, start: float = 0.0, **fields: Any
) -> list[Judgment]:
    """Judgments whose completions name their scores; the first side stands at random."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        sides = rng.normal(0, SPREAD / np.sqrt(2), 2)
        won = rng.random() < 1 / (1 + np.exp(-(sides[0] - sides[1]) / t))
        found.append(
            Judgment(
                f"prompt {seed} {i}",
                f"I say {sides[0]:.6f}",
                f"I say {sides[1]:.6f}",
                "first" if won else "second",
                f"annotator {i % 5}",
                START + timedelta(days=start + days * (i + 0.5) / n),
                "test",
                **fields,
            )
        )
    return found


def calibrated(t: float, *, aggregator: Aggregator | None = None, n: int = 400) -> RewardEnsemble:
    """Two members that read their score off the text, calibrated at about t."""
    members = tuple(
        FunctionScorer(name, lambda sample, plus=plus: score_of(sample) + plus)
        for name, plus in (("a", 0.0), ("b", 1.0))
    )
    aggregator = aggregator or mean()
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, SPREAD / np.sqrt(2), (2, n, 1)) + np.zeros((1, 1, 2))
    # Expected votes, not drawn ones: the fit is at t itself.
    p = 1 / (1 + np.exp(-(first - second).mean(axis=1) / t))
    pairs = ScoredPairs(first, second, p, np.ones(n), np.arange(n))
    calibration = fit_calibration(pairs, aggregator)
    return RewardEnsemble(members, Normaliser.identity(2), aggregator, calibration)


def write_run(folder: Path, t: float, *, aggregator: Aggregator | None = None) -> Path:
    """Write a plain ensemble's folder that a function's members stand for; see `loader`.

    Function members cannot be saved, so that the folder names a kind that no loader knows: a job
    whose pairs are all scored never loads it.
    """
    from ensemble_rm.versions.atomic_files import json_bytes

    ensemble = calibrated(t, aggregator=aggregator)
    assert ensemble.calibration is not None
    (folder / "members/0").mkdir(parents=True)
    (folder / "members/0/function.json").write_text("{}")
    said = {
        "format": 1,
        "members": [{"kind": "function", "folder": "members/0"}],
        "normaliser": ensemble.normaliser.to_json(),
        "aggregator": ensemble.aggregator.to_json(),
        "calibration": ensemble.calibration.to_json(),
        "provenance": {},
    }
    (folder / "ensemble.json").write_bytes(json_bytes(said))
    return folder


class Loader:
    """Stands for `from_pretrained`, and counts how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path, *, version: int | None = None) -> RewardEnsemble:
        assert folder.is_dir() and version in (None, 1)
        self.calls += 1
        return calibrated(1.0)


def stored(place: str | Path, *parts: Sequence[Judgment]) -> JudgmentStore:
    """A store that holds judgments."""
    store = JudgmentStore.create(place)
    for part in parts:
        store.add(part)
    return store


def fingerprint(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
