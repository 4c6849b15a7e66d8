"""The decision's laws: split, weights, shrinkage, gate, confirmation; planted values recovered."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ensemble_rm import Calibration
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration.methods.temperature import TemperatureFit, fit_temperature
from ensemble_rm.data.weights import effective_sample_size, inclusion_weights
from ensemble_rm.errors import OptionError, TooFewJudgmentsError
from ensemble_rm.evidence.dated_margins import (
    DAY,
    forgetting,
)
from ensemble_rm.recalibration.decision import decide
from ensemble_rm.recalibration.fitting import shrink
from ensemble_rm.recalibration.gate import clustered_mean, judge_candidate, losses
from ensemble_rm.recalibration.options import DecisionOptions
from ensemble_rm.recalibration.split import changed_since, compare_newest, split_by_time
from tests.support.recalibration_runs import calibrated, margins, together

OPTIONS = DecisionOptions()


def incumbent_at(t: float) -> Calibration:
    found = calibrated(t).calibration
    assert found is not None
    # As if from a fit like the tests': the expected votes it was made of have no noise.
    return replace(found, fit=replace(found.fit, log_se=0.1))


# Split -----------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 9)), min_size=2, max_size=60),
    share=st.floats(0.05, 0.95),
)
def test_parts_share_no_prompt_and_no_time(rows: list[tuple[int, int]], share: float) -> None:
    groups, times = (np.array(column) for column in zip(*rows, strict=True))
    try:
        parts = split_by_time(groups, times.astype(float), share=share)
    except TooFewJudgmentsError:
        return
    assert not set(groups[parts.fit]) & set(groups[parts.gate])
    assert times[parts.fit].max() < parts.cut <= times[parts.gate].min()
    assert len(parts.fit) + len(parts.gate) + parts.left_out == len(rows)
    assert (times >= parts.cut).sum() >= min(share * len(rows), len(rows)) - 1


def test_prompts_that_come_again_each_month_go_to_either_part_for_good() -> None:
    groups = np.tile(np.arange(400), 6)
    times = np.repeat(np.arange(6.0), 400)
    parts = split_by_time(groups, times, share=1 / 6)
    assert 150 < len(parts.gate) < 250
    later = split_by_time(np.tile(np.arange(400), 7), np.repeat(np.arange(7.0), 400), share=1 / 7)
    assert set(groups[parts.gate]) == set(np.tile(np.arange(400), 7)[later.gate])


def test_judgments_of_one_moment_cannot_be_split() -> None:
    with pytest.raises(TooFewJudgmentsError, match="cut in time"):
        split_by_time(np.arange(100), np.zeros(100), share=0.2)


# Weights ---------------------------------------------------------------------------------------


def test_a_judgment_counts_half_after_each_half_life() -> None:
    weights = forgetting(np.array([0.0, 30.0, 60.0]) * DAY, half_life=30 * DAY)
    np.testing.assert_allclose(weights, [0.25, 0.5, 1.0])
    np.testing.assert_array_equal(forgetting(np.arange(3.0), half_life=None), 1.0)
    assert (forgetting(np.array([-1e12, 0.0]), half_life=1.0) > 0).all()


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=20), st.floats(0.001, 1000.0))
def test_the_effective_size_is_kishs(w: list[float], scale: float) -> None:
    size = effective_sample_size(np.array(w) * scale)
    assert size == pytest.approx(effective_sample_size(w))
    assert 1 - 1e-9 <= size <= len(w) + 1e-9
    assert effective_sample_size(np.ones(7)) == 7


def test_a_batch_counts_as_many_judgments_as_it_has() -> None:
    inclusion = np.array([0.1, 0.2, 0.1, 0.001, 0.002, 1.0])
    weights = inclusion_weights(inclusion, np.array([0, 0, 0, 1, 1, 2])).weights
    np.testing.assert_allclose([weights[:3].sum(), weights[3:5].sum(), weights[5]], [3, 2, 1])
    assert weights[0] == pytest.approx(2 * weights[1])


# Shrinkage -------------------------------------------------------------------------------------


def fit_at(t: float, se: float) -> TemperatureFit:
    return TemperatureFit(t, t * 0.8, t * 1.2, se, 0.5, 300, 300)


@given(st.floats(0.05, 20.0), st.floats(0.05, 20.0), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_the_shrunk_temperature_lies_between(t: float, old: float, v: float, u: float) -> None:
    found = shrink(fit_at(t, v), fit_at(old, u))
    low, high = sorted((t, old))
    assert low * (1 - 1e-9) <= found.temperature <= high * (1 + 1e-9)
    assert u**2 / (u**2 + v**2) - 1e-9 <= found.share <= 1


def test_a_gap_that_chance_explains_is_weighed_by_precision() -> None:
    found = shrink(fit_at(1.05, 0.1), fit_at(1.0, 0.2))
    assert found.change == 0
    assert found.share == pytest.approx(0.04 / 0.05)
    # The oracle: the product of two normal densities over log T has its mode there.
    grid = np.linspace(-1, 1, 200_001)
    density = -((grid - math.log(1.05)) ** 2) / 0.02 - grid**2 / 0.08
    assert math.log(found.temperature) == pytest.approx(grid[density.argmax()], abs=1e-5)


def test_a_gap_beyond_chance_is_followed_nearly_whole() -> None:
    assert shrink(fit_at(3.0, 0.1), fit_at(1.0, 0.1)).share > 0.98
    assert shrink(fit_at(3.0, 0.1), None).temperature == 3.0


def test_shrinking_lowers_the_error_where_nothing_changed() -> None:
    rng = np.random.default_rng(0)
    own, shrunk = [], []
    for _ in range(400):
        old, new = np.exp(rng.normal(0, 0.15, 2))
        found = shrink(fit_at(new, 0.15), fit_at(old, 0.15))
        own.append(math.log(new) ** 2)
        shrunk.append(math.log(found.temperature) ** 2)
    assert np.mean(shrunk) < 0.8 * np.mean(own)


# Gate ------------------------------------------------------------------------------------------


def test_the_clustered_error_is_that_of_prompts_redrawn() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 400)
    weights = rng.uniform(0.5, 2, 400)
    values = rng.normal(size=60)[groups] + 0.3 * rng.normal(size=400)
    mean_, se, count = clustered_mean(values, weights, groups)
    assert mean_ == pytest.approx(np.average(values, weights=weights))
    rows = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    drawn = []
    for _ in range(2000):
        chosen = np.concatenate([rows[i] for i in rng.integers(0, count, count)])
        drawn.append(np.average(values[chosen], weights=weights[chosen]))
    assert se == pytest.approx(np.std(drawn), rel=0.1)


@pytest.mark.parametrize(
    ("gain", "noise", "passes", "why"),
    [
        (0.01, 0.01, True, "falls by"),
        (-0.01, 0.01, False, "not better"),
        (0.002, 1.0, False, "not excluded"),
    ],
)
def test_the_gate_asks_for_a_better_estimate_and_no_likely_loss(
    gain: float, noise: float, passes: bool, why: str
) -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0.3, 0.9, 400)
    change = rng.normal(0, noise, 400)
    after = before - gain + change - change.mean()
    found = judge_candidate(before, after, weights=np.ones(400), groups=np.arange(400), delta=0.005)
    assert found.passed is passes
    assert why in found.reason
    assert found.difference == pytest.approx(-gain)


def test_losses_are_the_cross_entropy_at_any_temperature() -> None:
    x, y = np.array([-3.0, 0.5, 800.0]), np.array([1.0, 0.5, 0.0])
    p = 1 / (1 + np.exp(-x[:2] / 2))
    expected = -(y[:2] * np.log(p) + (1 - y[:2]) * np.log(1 - p))
    np.testing.assert_allclose(losses(x, y, 2.0)[:2], expected)
    assert losses(x, y, 2.0)[2] == 400
    np.testing.assert_allclose(losses(x, y, math.inf), math.log(2))


# Confirmation ----------------------------------------------------------------------------------


def z_of(*parts: Any) -> float:
    data = together(*parts)
    split = split_by_time(data.groups, data.times, share=len(parts[-1]) / len(data))
    return compare_newest(data, split.fit, split.gate).z


def test_equal_parts_agree_as_often_as_stated() -> None:
    z = [
        z_of(margins(1.5, 300, seed=2 * s), margins(1.5, 300, seed=2 * s + 1, start=180.0))
        for s in range(300)
    ]
    assert np.std(z) == pytest.approx(1, abs=0.12)
    assert np.mean(np.abs(z) > 2.576) < 0.03


def test_coins_and_inverted_verdicts_are_told_from_what_was_before() -> None:
    before = margins(1.0, 300, seed=0)
    coins = margins(1.0, 300, seed=1, start=180.0, coins=True)
    inverted = replace(coins, targets=1 - margins(1.0, 300, seed=1, start=180.0).targets)
    assert z_of(before, coins) < -4
    assert z_of(margins(0.8, 900, seed=0), inverted) < -4 or np.isnan(z_of(before, inverted))


def test_what_was_judged_before_a_change_is_left_out_and_no_more() -> None:
    before = margins(1.0, 600, seed=0, days=60)
    odd = margins(1.0, 300, seed=1, days=30, start=90, coins=True)
    parts = [
        *(before, margins(3.0, 300, seed=2, days=30, start=60), odd),
        *(margins(3.0, 300, seed=3 + i, days=30, start=120 + 30 * i) for i in range(2)),
    ]
    data = together(*parts)
    split = split_by_time(data.groups, data.times, share=1 / 6)
    changed = changed_since(data, split.fit, len(split.gate))
    month = (data.times / (30 * DAY)).astype(int)
    assert changed[month < 2].mean() > 0.9  # T was another one
    assert changed[month == 3].mean() > 0.9  # coins
    assert not changed[(month == 2) | (month >= 4)].any()


def test_where_nothing_changed_hardly_anything_is_left_out() -> None:
    shares = []
    for seed in range(60):
        data = margins(1.5, 900, seed=seed)
        split = split_by_time(data.groups, data.times, share=1 / 6)
        shares.append(changed_since(data, split.fit, len(split.gate)).mean())
    assert np.mean(shares) < 0.03


# The whole decision ----------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0])
def test_a_planted_temperature_is_recovered(t: float) -> None:
    found = decide(margins(t, 6000, seed=1), mean(), incumbent_at(1.4), options=OPTIONS)
    assert found.answer == "publish", found.reason
    assert found.calibration is not None and found.final is not None
    assert abs(math.log(found.calibration.temperature / t)) < 3 * found.final.own.log_se
    assert found.calibration.fit.low < t < found.calibration.fit.high
    assert found.metrics["gate_nll_after"] < found.metrics["gate_nll_before"]


def test_the_published_one_is_the_refit_on_the_whole_window() -> None:
    data = margins(3.0, 3000, seed=1)
    old = incumbent_at(1.0)
    found = decide(data, mean(), old, options=OPTIONS)
    own = fit_temperature(data.margins, data.targets, groups=data.groups)
    assert found.calibration is not None
    assert found.calibration.temperature == pytest.approx(shrink(own, old.fit).temperature)
    assert found.sizes["window"]["judgments"] == 3000
    assert found.sizes["fit"]["judgments"] + found.sizes["gate"]["judgments"] == 3000


def test_order_and_orientation_do_not_matter() -> None:
    data = margins(2.0, 2000, seed=4)
    shuffled = data.take(np.random.default_rng(0).permutation(len(data)))
    swapped = replace(
        data,
        margins=-data.margins,
        member_margins=-data.member_margins,
        targets=1 - data.targets,
    )
    found = [
        decide(d, mean(), incumbent_at(1.0), options=OPTIONS) for d in (data, shuffled, swapped)
    ]
    for other in found[1:]:
        assert other.answer == found[0].answer == "publish"
        assert other.calibration is not None and found[0].calibration is not None
        assert other.calibration.temperature == pytest.approx(found[0].calibration.temperature)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("how", ["coins", "inverted"])
def test_a_corrupted_month_is_not_followed(seed: int, how: str) -> None:
    healthy = margins(1.0, 1500, seed=seed, days=150)
    month = margins(1.0, 300, seed=100 + seed, days=30, start=150, coins=how == "coins")
    if how == "inverted":
        month = replace(month, targets=1 - month.targets)
    found = decide(together(healthy, month), mean(), incumbent_at(1.0), options=OPTIONS)
    assert found.answer == "keep"
    # A month later it lies among the older judgments, and the newest refuse it.
    later = margins(1.0, 300, seed=200 + seed, days=30, start=180)
    window = together(healthy.take(np.flatnonzero(healthy.times > 30 * DAY)), month, later)
    assert decide(window, mean(), incumbent_at(1.0), options=OPTIONS).answer == "keep"


def test_a_true_change_is_followed_once_the_next_batch_confirms_it() -> None:
    old = incumbent_at(1.0)
    before = margins(1.0, 900, seed=0, days=90)
    first = margins(3.0, 600, seed=1, days=30, start=90)
    second = margins(3.0, 600, seed=2, days=30, start=120)
    waits = decide(together(before, first), mean(), old, options=replace(OPTIONS, gate_share=0.4))
    assert waits.answer == "keep" and waits.reason.startswith("unconfirmed")
    follows = decide(
        together(before, first, second), mean(), old, options=replace(OPTIONS, gate_share=0.28)
    )
    assert follows.answer == "publish", follows.reason


def test_too_few_is_said_by_name_and_counts_weights() -> None:
    few = decide(margins(2.0, 200, seed=0), mean(), incumbent_at(1.0), options=OPTIONS)
    assert few.answer == "too few" and "gate needs 50" in few.reason
    weighty = margins(2.0, 2000, seed=0)
    weights = np.where(np.arange(2000) % 100 == 0, 1000.0, 1.0)
    found = decide(replace(weighty, weights=weights), mean(), incumbent_at(1.0), options=OPTIONS)
    assert found.answer == "too few"
    assert found.sizes["window"]["effective"] < 25
    none = decide(weighty.take(np.arange(0)), mean(), incumbent_at(1.0), options=OPTIONS)
    assert none.answer == "too few"


def test_without_an_incumbent_the_coin_is_the_one_to_beat() -> None:
    found = decide(margins(1.0, 1500, seed=0), mean(), None, options=OPTIONS)
    assert found.answer == "publish"
    assert found.gate is not None
    assert found.gate.nll_before == pytest.approx(math.log(2))
    for seed in range(8):  # what says nothing gets no temperature that claims something
        coins = decide(margins(1.0, 1500, seed=seed, coins=True), mean(), None, options=OPTIONS)
        assert coins.calibration is None or coins.calibration.temperature > 8


def test_judgments_that_contradict_the_margins_flatten_the_incumbent_and_nothing_else() -> None:
    """No positive temperature fits them; keeping a sharp one is the worst of the answers."""
    turned = margins(1.0, 1500, seed=3)
    turned = replace(turned, targets=1 - turned.targets)
    found = decide(turned, mean(), incumbent_at(1.0), options=OPTIONS)
    assert found.answer == "publish", found.reason
    assert found.calibration is not None and found.candidate is not None
    assert found.calibration.temperature > 10
    assert found.metrics["gate_nll_after"] == pytest.approx(math.log(2), abs=0.05)
    assert found.metrics["gate_nll_after"] < found.metrics["gate_nll_before"] - 0.2
    assert "barely" in found.reason and "retrain" in found.reason
    first = decide(turned, mean(), None, options=OPTIONS)
    assert first.answer == "keep" and "contradict" in first.reason
    healed = decide(margins(1.0, 3000, seed=4), mean(), found.calibration, options=OPTIONS)
    assert healed.calibration is not None
    assert healed.calibration.temperature == pytest.approx(1.0, rel=0.2)


def test_slices_are_gated_and_drawn_towards_the_shrunk_temperature() -> None:
    parts = [
        replace(margins(t, 3000, seed=i), subsets=np.full(3000, i, np.int32))
        for i, t in enumerate((0.7, 2.8))
    ]
    data = replace(together(*parts), subset_names=("brief", "lengthy"))
    found = decide(data, mean(), incumbent_at(1.4), options=replace(OPTIONS, slices=True))
    assert found.answer == "publish", found.reason
    assert found.calibration is not None
    brief, lengthy = found.calibration.slices
    assert abs(math.log(brief.temperature / 0.7)) < 0.15
    assert abs(math.log(lengthy.temperature / 2.8)) < 0.15
    with pytest.raises(OptionError, match="with a `subset`"):
        decide(margins(1.0, 900, seed=0), mean(), None, options=replace(OPTIONS, slices=True))


def test_only_temperatures_are_recalibrated() -> None:
    from ensemble_rm.calibration.methods.power import PowerCurve

    old = replace(incumbent_at(1.0), method="power", curve=PowerCurve(1.0, 1.0))
    with pytest.raises(OptionError, match="'power'"):
        decide(margins(1.0, 900, seed=0), mean(), old, options=OPTIONS)
