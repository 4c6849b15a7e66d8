"""Draws with unequal probabilities: the stated ones hold, and so do size and limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.optimize import brentq
from scipy.stats import chi2

from ensemble_rm.active_learning.design import UNIT, Design, apportion, fill, plan_draw
from ensemble_rm.errors import OptionError


@st.composite
def pools(draw: st.DrawFn) -> dict[str, Any]:
    """Some pairs of some prompts, utilities with ties, and options that the pool allows."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=12))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    groups = groups[draw(st.permutations(range(len(groups))))]
    utility = draw(
        st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.5, 2.0]), min_size=len(groups))
        | st.lists(st.floats(-5, 5), min_size=len(groups))
    )[: len(groups)]
    most = draw(st.none() | st.integers(1, 4))
    room = int(sum(s if most is None else min(s, most) for s in sizes))
    return {
        "utility": np.array(utility),
        "groups": groups,
        "budget": draw(st.integers(1, room)),
        "max_per_prompt": most,
        "random_share": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "sharpness": draw(st.sampled_from([0.0, 1.0, 5.0])),
    }


@given(pools(), st.integers(0, 2**31))
def test_sums_and_limits_hold_exactly(pool: dict[str, Any], seed: int) -> None:
    design = plan_draw(**pool)
    most = pool["max_per_prompt"] or len(pool["groups"])
    assert int(design.parts.sum()) == pool["budget"] * UNIT
    assert design.parts.min() >= 1 and design.parts.max() <= UNIT
    for group in np.unique(pool["groups"]):
        assert int(design.parts[pool["groups"] == group].sum()) <= most * UNIT
    drawn = design.draw(seed=seed)
    assert len(drawn) == len(set(drawn.tolist())) == pool["budget"]
    assert np.bincount(pool["groups"][drawn]).max() <= most


@given(pools())
def test_a_higher_utility_is_never_asked_less_within_a_prompt(pool: dict[str, Any]) -> None:
    design = plan_draw(**pool)
    for group in np.unique(pool["groups"]):
        rows = np.flatnonzero(pool["groups"] == group)
        rows = rows[np.argsort(pool["utility"][rows], kind="stable")]
        assert (np.diff(design.parts[rows]) >= -2).all()  # rounding: a part or two


@given(pools())
def test_only_the_order_of_utilities_counts(pool: dict[str, Any]) -> None:
    ranks = np.unique(pool["utility"], return_inverse=True)[1]
    other = plan_draw(**(pool | {"utility": ranks**3 - 50.0}))
    assert (other.parts == plan_draw(**pool).parts).all()


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=20),
    st.lists(st.floats(0.1, 5), min_size=20, max_size=20),
    st.floats(0.01, 1),
)
def test_fill_is_the_capped_multiple(mass: list[float], caps: list[float], share: float) -> None:
    """The level, found by bisection instead."""
    w, c = np.array(mass), np.array(caps[: len(mass)])
    total = share * c.sum()

    def excess(level: float) -> float:
        return float(np.minimum(c, level * w).sum() - total)

    level = brentq(excess, 0, 2 * (c / w).max(), xtol=1e-14, rtol=1e-14)
    np.testing.assert_allclose(fill(w, c, total), np.minimum(c, level * w), rtol=1e-8)


@given(st.lists(st.floats(0, 9), min_size=1, max_size=15), st.integers(0, 200))
def test_apportion_rounds_within_bounds(shares: list[float], total: int) -> None:
    x = np.array(shares)
    least, most = np.zeros(len(x), dtype=np.int64), np.full(len(x), 10)
    total = min(total, int(most.sum()))
    found = apportion(x, total, least, most)
    assert found.sum() == total and (found >= least).all() and (found <= most).all()
    if abs(total - x.sum()) < 1e-9:
        assert (np.abs(found - x) < 1 + 1e-9).all()


def some_design(**changes: Any) -> tuple[Design, np.ndarray]:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(40), rng.integers(1, 5, 40))
    utility = rng.gamma(0.5, size=len(groups))
    options: dict[str, Any] = {"budget": 18, "max_per_prompt": 1, "random_share": 0.25}
    return plan_draw(utility, groups, **(options | changes)), utility


@pytest.mark.parametrize("changes", [{}, {"max_per_prompt": 2, "budget": 45}, {"sharpness": 2.5}])
def test_pairs_are_drawn_as_often_as_stated(changes: dict[str, Any]) -> None:
    """Counts of many draws against π: their chi-square, and no pair far off."""
    design, _ = some_design(**changes)
    pi, draws = design.inclusion, 20_000
    counts = np.zeros(len(pi))
    for seed in range(draws):
        counts[design.draw(seed=seed)] += 1
    spread = np.sqrt(draws * pi * (1 - pi))
    free = spread > 0
    assert (counts[~free] == draws).all()
    z = (counts - draws * pi)[free] / spread[free]
    assert np.abs(z).max() < 4.5
    assert (z**2).sum() < chi2.ppf(0.9999, free.sum())


def test_weights_undo_the_selection() -> None:
    """1/π-weighted means are unbiased of anything, and plain means are not."""
    design, utility = some_design()
    rng = np.random.default_rng(0)
    y = utility + rng.normal(size=len(utility))
    drawn = [design.draw(seed=seed) for seed in range(6000)]
    totals = np.array([(y[rows] / design.inclusion[rows]).mean() for rows in drawn])
    totals *= design.budget / len(y)
    error = totals.std() / np.sqrt(len(totals))
    assert abs(totals.mean() - y.mean()) < 4 * error
    plain = np.array([y[rows].mean() for rows in drawn])
    assert plain.mean() - y.mean() > 0.2  # what selection does to those who forget it


def test_random_is_alike_for_all() -> None:
    groups = np.arange(50)
    for options in ({"utility": None}, {"utility": np.arange(50.0), "random_share": 1.0}):
        design = plan_draw(groups=groups, budget=10, **options)
        np.testing.assert_allclose(design.inclusion, 0.2, atol=2 / UNIT)
    flat = plan_draw(np.arange(50.0), groups, budget=10, random_share=0.0, sharpness=0.0)
    np.testing.assert_allclose(flat.inclusion, 0.2, atol=2 / UNIT)


def test_the_random_share_bounds_every_probability() -> None:
    design, _ = some_design(random_share=0.4, max_per_prompt=None, sharpness=3.0)
    n = len(design.parts)
    assert design.floor >= 0.4 * design.budget / n * (1 - 1e-6)
    assert design.floor == design.inclusion.min()


def test_strata_get_their_share() -> None:
    rng = np.random.default_rng(1)
    groups = np.arange(300)
    strata = rng.integers(0, 3, 300)
    design = plan_draw(rng.random(300), groups, budget=60, strata=strata)
    expected = np.bincount(strata, design.inclusion)
    for seed in range(200):
        found = np.bincount(strata[design.draw(seed=seed)], minlength=3)
        assert (np.abs(found - expected) < 1 + 1e-9).all()


def test_the_whole_pool_can_be_drawn() -> None:
    design = plan_draw(np.arange(6.0), [0, 0, 0, 1, 1, 2], budget=6, max_per_prompt=None)
    assert design.draw(seed=0).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 9}, "budget"),
        ({"budget": 4}, "the 3 pairs that can be drawn, at most 1 per prompt,"),
        ({"random_share": 1.5}, "random_share"),
        ({"max_per_prompt": 0}, "max_per_prompt"),
        ({"sharpness": -1.0}, "sharpness"),
        ({"utility": [1.0, float("nan"), 0, 0, 0, 0]}, "finite"),
        ({"strata": [0, 1, 0, 0, 0, 0]}, "strata"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"utility": np.arange(6.0), "groups": [0, 0, 0, 1, 1, 2], "budget": 2}
    with pytest.raises(OptionError, match=said):
        plan_draw(**(given | changes))
