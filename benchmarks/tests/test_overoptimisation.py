"""The over-optimisation benchmark's own arithmetic, on curves whose answers are plain."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.overoptimisation import curve_figures, synthetic_world


def test_shares_of_a_drop() -> None:
    rng = np.random.default_rng(0)
    single = np.array([0.0, 2.0, -2.0]) + rng.normal(0, 0.1, (30, 3))
    half = np.array([0.0, 2.0, 0.0]) + rng.normal(0, 0.1, (30, 3))
    rising = np.array([0.0, 1.0, 2.0]) + rng.normal(0, 0.1, (30, 3))
    curves = curve_figures.Curves({"single": single, "half": half, "rising": rising})
    for arm, share in (("single", 0.0), ("half", 0.5), ("rising", 1.0)):
        found = curves.removed(arm, "single")
        assert found.value == pytest.approx(share, abs=0.05)
        assert found.low <= found.value <= found.high and found.high - found.low < 0.1
    assert curves.removed("single", "rising") is None  # no drop: no share of it
    gain = curves.peak_gain("half", "single")
    assert gain.low < 0 < gain.high and curves.final("single").high < -1.8


def test_gold_is_standardised_and_labels_flip_as_told() -> None:
    rng = np.random.default_rng(0)
    clean, noisy = (synthetic_world.make_world(rng, flipped=share) for share in (0.0, 0.25))
    gold = clean.gold(synthetic_world.draw(rng, 100_000))
    assert abs(gold.mean()) < 0.05 and gold.std() == pytest.approx(1, abs=0.2)
    agrees = [(w.gold(w.chosen) > w.gold(w.rejected)).mean() for w in (clean, noisy)]
    # A flip of a quarter halves what agreement is above chance.
    assert agrees[1] - 0.5 == pytest.approx((agrees[0] - 0.5) / 2, abs=0.06)


@pytest.mark.slow
def test_members_differ_and_learn() -> None:
    made = synthetic_world.make_world(np.random.default_rng(1), flipped=0.0)
    for score in (
        synthetic_world.mlp_members(made, 3, seed=0),
        synthetic_world.head_members(made, 3, views=False, seed=0),
        synthetic_world.head_members(made, 3, views=True, seed=0),
    ):
        margins = score(made.chosen) - score(made.rejected)
        assert margins.shape == (synthetic_world.PAIRS, 3)
        assert (np.mean(margins > 0, axis=0) > 0.6).all()
        assert np.abs(np.diff(margins, axis=1)).max() > 1e-3
