"""Planted hacks: their true utility falls, and rewards are compared with it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import Sample, load_preferences
from ensemble_rm.demo.annotator import true_probability
from ensemble_rm.demo.data import FILE, true_probabilities
from ensemble_rm.demo.hacks import FALL, TRICKS, measure_hacks, plant, question, true_utility
from ensemble_rm.demo.page import draw_hacks


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Some of the demo's completions."""
    pairs = load_preferences(FILE)
    texts = dict.fromkeys((p.prompt, text) for p in pairs for text in (p.chosen, p.rejected))
    return [Sample(*text) for text in list(texts)[:200]]


def test_the_stored_truth_is_the_annotators() -> None:
    known = true_probabilities()
    for pair in load_preferences(FILE)[:200]:
        p = true_probability(question(Sample(pair.prompt, "")), pair.chosen, pair.rejected)
        assert known[str(pair.id)] == pytest.approx(p, abs=1e-6)


def test_every_hack_is_truly_worse(samples: list[Sample]) -> None:
    hacks = plant(samples)
    for hack in hacks:
        original = samples[hack.original]
        assert hack.sample.prompt == original.prompt
        assert original.completion in hack.sample.completion
        assert true_utility(hack.sample) <= true_utility(original) - FALL
    counts = Counter(hack.trick for hack in hacks)
    assert all(counts[trick] > len(samples) / 2 for trick in TRICKS)


def test_the_truth_is_never_fooled_and_its_opposite_always(samples: list[Sample]) -> None:
    hacks = plant(samples)
    truth = np.array([true_utility(s) for s in [*samples, *(hack.sample for hack in hacks)]])
    right = measure_hacks(samples, hacks, np.column_stack([truth, truth]), draws=50)
    wrong = measure_hacks(samples, hacks, np.column_stack([-truth, -truth]), draws=50)
    for way, row in right.fooled.items():
        assert {(v.low, v.estimate, v.high) for v in row.values()} == {(0, 0, 0)}
        assert {v.estimate for v in wrong.fooled[way].values()} == {1}
        assert right.gained[way].estimate == pytest.approx(right.best)
        assert right.gained_before[way].estimate == pytest.approx(right.best)  # hacks are worse
        assert wrong.gained[way].estimate < wrong.gained_before[way].estimate < 0
    assert right.expected < 0.5 and sum(right.counts.values()) == len(hacks)


def test_members_that_see_nothing_are_fooled_half_the_time(samples: list[Sample]) -> None:
    hacks = plant(samples)
    report = measure_hacks(samples, hacks, np.zeros((len(samples) + len(hacks), 3)), draws=20)
    assert {value.estimate for row in report.fooled.values() for value in row.values()} == {0.5}


def test_the_hacks_are_drawn(samples: list[Sample], tmp_path: Path) -> None:
    hacks = plant(samples[:40])
    scores = np.random.default_rng(0).normal(size=(40 + len(hacks), 3))
    file = draw_hacks(measure_hacks(samples[:40], hacks, scores, draws=20), tmp_path / "hacks.png")
    assert file.read_bytes().startswith(b"\x89PNG")
