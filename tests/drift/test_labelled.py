"""The sequential test: false alarms of healthy lives, power, invariances, resumption."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import expit
from scipy.stats import beta as beta_distribution

from ensemble_rm.calibration import TemperatureFit, fit_temperature
from ensemble_rm.drift import DriftTest
from ensemble_rm.drift.labelled import SLOT, Bets
from ensemble_rm.errors import NonFiniteScoreError, OptionError


def upper95(alarms: int, lives: int) -> float:
    """Clopper and Pearson's one-sided bound on a share."""
    return float(beta_distribution.ppf(0.95, alarms + 1, lives - alarms))


def fit_of(t: float, log_se: float = 0.1, prompts: int = 300) -> TemperatureFit:
    reach = math.exp(1.97 * log_se)
    return TemperatureFit(t, t / reach, t * reach, log_se, 0.5, prompts, prompts)


def judged(
    rng: np.random.Generator, n: int, t: float, *, spread: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    x = rng.normal(0, spread, n)
    return x, (rng.random(n) < expit(x / t)).astype(float)


def live(test: DriftTest, rng: np.random.Generator, t: float, n: int = 3000) -> DriftTest:
    x, y = judged(rng, n, t)
    return test.update(x, y, prompts=range(test.prompts, test.prompts + n), at="all")


# The bets ------------------------------------------------------------------------------------


def test_capital_is_the_mixture_of_products_over_entries_and_stakes() -> None:
    rng = np.random.default_rng(0)
    z, stakes = rng.uniform(-0.3, 0.3, 2 * SLOT + 37), (0.1, 0.5)
    bets, path = Bets(stakes).take(z)
    for n in (1, SLOT, SLOT + 1, len(z)):
        total, entered = 0.0, 0.0
        for k, begin in enumerate(range(0, n, SLOT)):
            share = 1 / ((k + 1) * (k + 2))
            entered += share
            total += share * np.mean([np.prod(1 + s * z[begin:n]) for s in stakes])
        assert path[n - 1] == pytest.approx(math.log(total + 1 - entered))
    assert bets.log_e == pytest.approx(path[-1])


@given(st.lists(st.floats(-0.5, 5), max_size=40), st.integers(0, 40))
def test_bets_go_on_where_they_stopped(payoffs: list[float], cut: int) -> None:
    whole, path = Bets((0.3, 1.5)).take(payoffs)
    first, before = Bets((0.3, 1.5)).take(payoffs[:cut])
    both, after = first.take(payoffs[cut:])
    assert np.concatenate([before, after]) == pytest.approx(path)
    assert both.log_e == pytest.approx(whole.log_e)


def test_payoffs_of_zero_change_no_capital() -> None:
    bets, path = Bets((0.5,)).take(np.zeros(5 * SLOT))
    assert path == pytest.approx(np.zeros(5 * SLOT), abs=1e-12)
    assert bets.log_e == pytest.approx(0, abs=1e-12)


def test_a_ruinous_payoff_is_refused() -> None:
    with pytest.raises(OptionError, match="ruins"):
        Bets((1.0,)).take([-1.0])


# False alarms --------------------------------------------------------------------------------


@pytest.mark.parametrize("edge", ["low", "high"])
def test_at_the_edge_of_the_null_the_mean_capital_is_at_most_one(edge: str) -> None:
    """The e-value's mean, over short lives where it is not all in rare events."""
    test = DriftTest.start(fit_of(1.0))
    e = [
        math.exp(live(test, np.random.default_rng(i), getattr(test, edge), 40).log_e)
        for i in range(2000)
    ]
    assert np.mean(e) - 2 * np.std(e) / math.sqrt(len(e)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("where", ["low", "high", "estimate"])
def test_healthy_lives_alarm_at_most_at_the_stated_share(where: str) -> None:
    """1,000 lives of 3,600 judgments each; the bound of 95 % on the share lies below alpha."""
    test = DriftTest.start(fit_of(1.0))
    t = {"low": test.low, "high": test.high, "estimate": 1.0}[where]
    alarms = sum(live(test, np.random.default_rng(i), t, 3600).alarm for i in range(1000))
    assert upper95(alarms, 1000) <= test.alpha


@pytest.mark.slow
def test_the_promise_covers_the_fit() -> None:
    """T is fitted on 300 judgments, and then tested for two years of 300 a month."""
    alarms = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        test = DriftTest.start(fit_temperature(*judged(rng, 300, 1.0)))
        alarms += live(test, rng, 1.0, 7200).alarm
    assert upper95(alarms, 1000) <= 0.05


@pytest.mark.slow
def test_neither_ties_nor_clusters_nor_another_curve_raise_the_alarms() -> None:
    """Prompts of five dependent judgments, ties by Davidson, and a curve that is no σ(Δ/T).

    The null holds in the mean score equation alone: T is what a fit to very many judgments finds.
    """

    def months(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray, Any]:
        groups = np.repeat(np.arange(prompts), 5)
        x = np.repeat(rng.normal(0, 2, prompts), 5) + rng.normal(0, 0.5, 5 * prompts)
        drive = np.sign(x) * np.abs(x) ** 0.6  # a power, γ = 0.6
        tie = 1 / (1 + np.exp(drive / 2) + np.exp(-drive / 2))
        noise = np.where(
            rng.random(len(x)) < 0.8, np.repeat(rng.random(prompts), 5), rng.random(len(x))
        )
        first = np.exp(drive / 2) * tie
        return x, np.where(noise < first, 1.0, np.where(noise < first + tie, 0.5, 0.0)), groups

    x, y, _ = months(np.random.default_rng(10**6), 200_000)
    t = fit_temperature(x, y).temperature
    test = DriftTest(t, t, 0.05, 0.05)  # no slack: both gamblers stand at their edge
    alarms = 0
    for seed in range(1000):
        x, y, groups = months(np.random.default_rng(seed), 1000)
        alarms += test.update(x, y, prompts=groups, at="all").alarm
    assert upper95(alarms, 1000) <= 0.05


# Power ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "direction"), [(2.5, "overconfident"), (0.4, "underconfident")], ids=["up", "down"]
)
def test_a_change_of_scale_is_found_after_a_healthy_year(t: float, direction: str) -> None:
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        test = live(DriftTest.start(fit_of(1.0)), rng, 1.0, 3600)
        assert not test.alarm
        test = live(test, rng, t, 900)
        assert test.direction == direction
        found.append(test.alarm)
    assert all(found)


@pytest.mark.parametrize("kind", ["offset", "length"])
def test_offsets_and_length_bias_are_found_as_overconfidence(kind: str) -> None:
    """What moves verdicts and is not in the margin flattens their slope on the margin."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, 3000)
    if kind == "offset":  # an offset of each prompt's sides, such as a style that is now preferred
        logit = x + 3.0 * rng.choice([-1, 1], len(x))
    else:
        logit = x + 2.5 * rng.normal(0, 1, len(x))
    y = (rng.random(len(x)) < expit(logit)).astype(float)
    test = DriftTest.start(fit_of(1.0)).update(x, y, prompts=range(len(x)), at="2026-03")
    assert test.alarm
    assert test.direction == "overconfident"
    assert test.alarmed_at == "2026-03"
    assert 0 < test.alarmed_after < len(x)


def test_selected_pairs_weighted_by_their_inclusion_tell_what_a_random_draw_tells() -> None:
    """A curve that is no σ(Δ/T), small margins selected: without weights the test goes astray."""
    rng = np.random.default_rng(0)
    n = 60_000
    x = rng.normal(0, 2, n)
    y = (rng.random(n) < expit(np.sign(x) * np.abs(x) ** 0.4)).astype(float)
    t = fit_temperature(x, y).temperature
    pi = np.where(np.abs(x) < 1.5, 1.0, 0.1)
    asked = rng.random(n) < pi
    given = {"prompts": np.flatnonzero(asked), "at": "all"}
    null = DriftTest(t / 1.15, t * 1.15, 0.05, 0.05, min_inclusion=0.1)
    assert null.update(x[asked], y[asked], **given).alarm
    assert not null.update(x[asked], y[asked], inclusion=pi[asked], **given).alarm


def test_by_default_random_draws_alone_count() -> None:
    x, y = judged(np.random.default_rng(0), 400, 3.0)
    pi = np.where(np.arange(400) % 2, 0.5, 1.0)
    test = DriftTest.start(fit_of(1.0))
    mixed = test.update(x, y, prompts=range(400), at="a", inclusion=pi)
    drawn = test.update(x[::2], y[::2], prompts=range(0, 400, 2), at="a")
    assert mixed.log_e == drawn.log_e
    assert mixed.history[-1].selected == 200
    assert test.update(x, y, prompts=range(400), at="a", inclusion=np.full(400, 0.5)) is test


# Invariances ---------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_sides_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = judged(rng, 60, 2.0)
    y[:10] = 0.5
    x[5] = 0.0
    flip = rng.random(60) < 0.5
    test = DriftTest.start(fit_of(1.0))
    groups = rng.integers(0, 30, 60)
    turned = test.update(np.where(flip, -x, x), np.where(flip, 1 - y, y), prompts=groups, at="a")
    assert turned.log_e == pytest.approx(test.update(x, y, prompts=groups, at="a").log_e, abs=1e-12)


@given(st.integers(1, 599))
def test_batches_may_be_cut_anywhere_between_prompts(cut: int) -> None:
    x, y = judged(np.random.default_rng(1), 600, 2.0)
    names = [f"prompt {i // 2}" for i in range(600)]
    cut -= cut % 2
    test = DriftTest.start(fit_of(1.0))
    whole = test.update(x, y, prompts=names, at="a")
    first = test.update(x[:cut], y[:cut], prompts=names[:cut], at="a")
    first = DriftTest.from_json(json.loads(json.dumps(first.to_json())))
    both = first.update(x[cut:], y[cut:], prompts=names[cut:], at="a")
    assert both.log_e == pytest.approx(whole.log_e)
    assert both.peak == pytest.approx(whole.peak)
    assert both.seen == whole.seen
    assert (both.alarm, both.alarmed_after) == (whole.alarm, whole.alarmed_after)


def test_judgments_given_twice_change_nothing() -> None:
    x, y = judged(np.random.default_rng(2), 500, 2.0)
    test = DriftTest.start(fit_of(1.0)).update(x, y, prompts=range(500), at="a")
    assert test.update(x, y, prompts=range(500), at="b") is test
    more = test.update(np.append(x, 1.0), np.append(y, 0.0), prompts=range(501), at="b")
    assert more.prompts == 501
    assert more.history[-1].again == 500


def test_prompts_of_the_fit_are_left_out() -> None:
    x, y = judged(np.random.default_rng(2), 100, 2.0)
    test = DriftTest.start(fit_of(1.0), known=range(50))
    assert test.update(x, y, prompts=range(100), at="a").prompts == 50


def test_a_prompt_pays_once_however_often_it_is_judged() -> None:
    x, y = judged(np.random.default_rng(3), 200, 2.0)
    test = DriftTest.start(fit_of(1.0))
    once = test.update(x, y, prompts=range(200), at="a")
    five = test.update(np.repeat(x, 5), np.repeat(y, 5), prompts=np.repeat(range(200), 5), at="a")
    assert five.log_e == pytest.approx(once.log_e)
    votes = test.update(x, y, prompts=range(200), at="a", counts=np.full(200, 5.0))
    assert votes.log_e == pytest.approx(once.log_e)


def test_the_null_holds_the_interval_and_the_tolerance() -> None:
    narrow = DriftTest.start(fit_of(2.0, 0.001), tolerance=0.2)
    assert (narrow.low, narrow.high) == pytest.approx((2 / 1.2, 2.4))
    fit = fit_of(2.0, 0.15)
    wide = DriftTest.start(fit, tolerance=0.0)
    assert wide.low < fit.low < fit.high < wide.high


def test_refusals() -> None:
    test = DriftTest.start(fit_of(1.0))
    with pytest.raises(NonFiniteScoreError):
        test.update([math.nan], [1.0], prompts=[0], at="a")
    for bad in (
        {"targets": [1.5]},
        {"prompts": [0, 1]},
        {"counts": [0.0]},
        {"inclusion": [0.0]},
    ):
        given = {"targets": [1.0], "prompts": [0], "at": "a"} | bad
        with pytest.raises(OptionError):
            test.update([1.0], given.pop("targets"), **given)
    for options in ({"promise": 0.0}, {"tolerance": -1.0}, {"min_inclusion": 0.0}):
        with pytest.raises(OptionError):
            DriftTest.start(fit_of(1.0), **options)
