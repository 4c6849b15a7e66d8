"""Weights of unequal probabilities: what they undo, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ensemble_rm.active_learning.design import plan_draw
from ensemble_rm.data.weights import (
    effective_sample_size,
    inclusion_weights,
    sample_weights,
    thin_to_equal,
)
from ensemble_rm.errors import OptionError

weights = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)


@given(weights, st.floats(1e-3, 1e3))
def test_the_effective_size_has_its_bounds(w: list[float], scale: float) -> None:
    size = effective_sample_size(w)
    assert 1 - 1e-9 <= size <= len(w) + 1e-9
    assert effective_sample_size(scale * np.array(w)) == pytest.approx(size)
    assert effective_sample_size(np.ones(len(w))) == pytest.approx(len(w))


def test_the_effective_size_is_that_of_the_means_variance() -> None:
    """A weighted mean varies as a plain one of so many."""
    rng = np.random.default_rng(0)
    w = rng.gamma(1.0, size=40) + 0.05
    means = (rng.normal(size=(40_000, 40)) * w).sum(1) / w.sum()
    assert 1 / means.var() == pytest.approx(effective_sample_size(w), rel=0.04)


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=20))
def test_each_design_counts_as_often_as_it_was_asked(pi: list[float]) -> None:
    both = inclusion_weights([*pi, *(p / 1000 for p in pi)], ["a"] * len(pi) + ["b"] * len(pi))
    one = inclusion_weights(pi)
    np.testing.assert_allclose(both.weights, np.tile(one.weights, 2))
    assert one.weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(one.weights * pi, one.weights[0] * pi[0])


def test_what_was_drawn_alike_has_weight_one() -> None:
    found = inclusion_weights([None, None, 0.5, 0.25], ["old", "old", "new", "new"])
    np.testing.assert_allclose(found.weights, [1, 1, 2 / 3, 4 / 3])
    again = inclusion_weights([0.5, 0.25, 1.0], np.array([3, 3, 1]))
    np.testing.assert_allclose(again.weights, [2 / 3, 4 / 3, 1])
    assert "count as" in found.remark
    assert "equal weights" in inclusion_weights([0.1, 0.1]).remark
    assert inclusion_weights([]).effective == 0


def test_known_weights_are_scaled() -> None:
    found = sample_weights([2.0, 6.0])
    np.testing.assert_allclose(found.weights, [0.5, 1.5])
    assert found.effective == effective_sample_size([1.0, 3.0])
    assert sample_weights([]).effective == 0


def test_mixtures_and_impossible_probabilities_are_refused() -> None:
    with pytest.raises(OptionError, match="1 of the 2 of design None"):
        inclusion_weights([None, 0.5])
    for bad in (0.0, -0.1, 1.5):
        with pytest.raises(OptionError, match=r"\(0, 1\]"):
            inclusion_weights([bad])
    with pytest.raises(OptionError, match="> 0"):
        effective_sample_size([1.0, 0.0])
    with pytest.raises(OptionError, match="floor"):
        thin_to_equal([0.1, 0.5], floor=0.2, seed=0)


def test_thinning_leaves_equal_probabilities() -> None:
    rng = np.random.default_rng(2)
    design = plan_draw(rng.random(60), np.arange(60), budget=20, random_share=0.4)
    pi, floor, draws = design.inclusion, design.floor, 20_000
    counts = np.zeros(60)
    for seed in range(draws):
        rows = design.draw(seed=seed)
        counts[rows[thin_to_equal(pi[rows], floor=floor, seed=seed)]] += 1
    z = (counts - draws * floor) / np.sqrt(draws * floor * (1 - floor))
    assert np.abs(z).max() < 4.5
