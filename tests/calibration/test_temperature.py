"""Temperature: planted truths, coverage, refusals, invariances; the normaliser."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.optimize import minimize_scalar

from ensemble_rm import Calibration
from ensemble_rm.aggregation import lcb, mean
from ensemble_rm.calibration import Normaliser, ScoredPairs, fit_normaliser, fit_temperature
from ensemble_rm.calibration.calibration import fit_calibration
from ensemble_rm.calibration.methods.temperature import (
    fit_mixture_temperature,
    margin_nll,
    mixture_probability,
    pooling_gain,
)
from ensemble_rm.errors import (
    NonFiniteScoreError,
    NoPositiveTemperatureError,
    OptionError,
    SeparableError,
    TooFewJudgmentsError,
)


def planted(t: float, n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2 * t, n)
    return x, (rng.random(n) < 1 / (1 + np.exp(-x / t))).astype(float)


@pytest.mark.parametrize("t", [0.4, 1.0, 3.0])
def test_a_planted_temperature_lies_in_its_interval(t: float) -> None:
    x, y = planted(t)
    fit = fit_temperature(x, y)
    assert fit.low < t < fit.high
    assert fit.temperature == pytest.approx(t, rel=0.1)


@pytest.mark.parametrize("t", [0.4, 3.0])
def test_float32_and_float64_agree(t: float) -> None:
    x, y = planted(t)
    narrow = fit_temperature(x.astype(np.float32), y.astype(np.float32)).temperature
    assert narrow == pytest.approx(fit_temperature(x, y).temperature, rel=1e-5)


def test_the_fit_is_the_minimum_of_the_nll() -> None:
    x, y = planted(1.7, n=300)
    y[:50] = 0.5
    w = np.random.default_rng(1).uniform(0.5, 2, 300)
    fit = fit_temperature(x, y, weights=w)
    found = minimize_scalar(
        lambda b: margin_nll(x, y, w, b),
        bounds=(1e-3, 10),
        method="bounded",
        options={"xatol": 1e-12},
    )
    assert 1 / fit.temperature == pytest.approx(found.x, rel=1e-5)
    assert fit.nll <= found.fun + 1e-12


@given(st.floats(0.01, 100), st.integers(0, 99))
def test_scale_and_sides(scale: float, seed: int) -> None:
    x, y = planted(1.0, n=200)
    fit = fit_temperature(x, y)
    assert fit_temperature(scale * x, y).temperature == pytest.approx(scale * fit.temperature)
    flip = np.random.default_rng(seed).random(len(x)) < 0.5
    turned = fit_temperature(np.where(flip, -x, x), np.where(flip, 1 - y, y))
    assert turned.temperature == pytest.approx(fit.temperature)
    assert turned.low == pytest.approx(fit.low)


def test_a_weight_of_two_is_a_judgment_twice() -> None:
    x, y = planted(1.0, n=300)
    twice = fit_temperature(np.concatenate([x, x[:100]]), np.concatenate([y, y[:100]]))
    w = np.where(np.arange(300) < 100, 2.0, 1.0)
    assert fit_temperature(x, y, weights=w).temperature == pytest.approx(twice.temperature)


def test_votes_pull_like_the_verdicts_that_they_sum() -> None:
    x, y = planted(1.0, n=600)
    shares = y.reshape(200, 3).mean(1)
    margins = x.reshape(200, 3)[:, 0]
    split = fit_temperature(np.repeat(margins, 3), y)
    assert fit_temperature(margins, shares).temperature == pytest.approx(split.temperature)


@pytest.mark.slow
def test_intervals_cover_planted_truths_in_clustered_data() -> None:
    """At a nominal 95 %, at least 93 % over 1,000 replicates; ignoring prompts falls short."""
    covered = blind = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        # One prompt's pairs share a margin and, mostly, the verdict's noise.
        groups = np.repeat(np.arange(60), 5)
        x = np.repeat(rng.normal(0, 3, 60), 5)
        noise = np.where(rng.random(300) < 0.8, np.repeat(rng.random(60), 5), rng.random(300))
        y = (noise < 1 / (1 + np.exp(-x / 1.5))).astype(float)
        fit = fit_temperature(x, y, groups=groups)
        covered += fit.low <= 1.5 <= fit.high
        alone = fit_temperature(x, y)
        blind += alone.low <= 1.5 <= alone.high
    assert covered >= 930
    assert blind < 900


def test_refusals() -> None:
    x, y = planted(1.0, n=200)
    with pytest.raises(TooFewJudgmentsError, match="49"):
        fit_temperature(x[:49], y[:49])
    with pytest.raises(SeparableError):
        fit_temperature(x, (x > 0).astype(float))
    with pytest.raises(NoPositiveTemperatureError, match="contradict"):
        fit_temperature(x, 1 - y)
    with pytest.raises(TooFewJudgmentsError):
        fit_temperature(np.zeros(100), np.ones(100))
    with pytest.raises(NonFiniteScoreError):
        fit_temperature(np.append(x, np.nan), np.append(y, 1))
    with pytest.raises(OptionError):
        fit_temperature(x, y + 1)
    with pytest.raises(OptionError):
        fit_temperature(x, y[:-1])


def test_mixture_temperature_is_the_best_of_a_grid() -> None:
    rng = np.random.default_rng(0)
    x, y = planted(1.0, n=800)
    members = x[:, None] + rng.normal(0, 1, (800, 4))
    t = fit_mixture_temperature(members, y)

    def loss(temperature: float) -> float:
        p = np.clip(mixture_probability(members, temperature), 1e-12, 1 - 1e-12)
        return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())

    assert loss(t) <= min(loss(g) for g in np.geomspace(0.1, 10, 400)) + 1e-9


def test_pooling_gains_where_members_err_apart_and_not_where_they_are_one() -> None:
    rng = np.random.default_rng(0)
    x, y = planted(1.0, n=3000)
    apart = x[:, None] + rng.normal(0, 3, (3000, 5))
    assert pooling_gain(apart, apart.mean(1), y) > 0.02
    same = np.repeat(apart[:, :1], 5, axis=1)
    assert pooling_gain(same, same.mean(1), y) == pytest.approx(0, abs=1e-9)


def pairs(n: int = 400) -> ScoredPairs:
    rng = np.random.default_rng(3)
    x, y = planted(1.0, n=n)
    second = rng.normal(size=(n, 3))
    first = second + x[:, None] + rng.normal(0, 0.5, (n, 3))
    return ScoredPairs(first, second, y, np.ones(n), np.arange(n) // 2)


def test_a_calibration_goes_through_json() -> None:
    scored = pairs()
    calibration = fit_calibration(scored, lcb(1.0), digest="d")
    assert Calibration.from_json(calibration.to_json()) == calibration
    p = calibration.probability(scored.margins(lcb(1.0)))
    np.testing.assert_allclose(p + calibration.probability(-scored.margins(lcb(1.0))), 1)


def test_mean_of_margins_is_margin_of_means() -> None:
    scored = pairs()
    np.testing.assert_allclose(scored.margins(mean()), scored.member_margins.mean(1))


def test_normaliser_ignores_what_is_common_to_a_prompt() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(500), 2)
    within = rng.normal(0, [1.0, 5.0], (1000, 2))
    offsets = rng.normal(0, 100, (500, 2))[groups]
    one, two = (fit_normaliser(s, groups) for s in (within, within + offsets))
    np.testing.assert_allclose(one.scale, two.scale)
    np.testing.assert_allclose(one.scale, [1, 5], rtol=0.1)
    np.testing.assert_allclose(one(within).mean(0), 0, atol=1e-9)


@given(st.floats(0.01, 100), st.floats(-50, 50))
def test_normalised_scores_do_not_know_a_members_unit(scale: float, shift: float) -> None:
    rng = np.random.default_rng(0)
    x, groups = rng.normal(size=(100, 3)), np.arange(100) // 2
    unit = np.array([1.0, scale, 1.0])
    np.testing.assert_allclose(
        fit_normaliser(x * unit + shift, groups)(x * unit + shift),
        fit_normaliser(x, groups)(x),
        atol=1e-7,
    )


def test_a_normaliser_refuses_what_has_no_scale() -> None:
    with pytest.raises(OptionError, match="the same score"):
        fit_normaliser(np.ones((4, 1)), [0, 0, 1, 1])
    with pytest.raises(OptionError, match="two reference completions"):
        fit_normaliser([[1.0], [2.0]], [0, 1])
    with pytest.raises(NonFiniteScoreError):
        fit_normaliser([[np.nan], [2.0]], [0, 0])
    with pytest.raises(OptionError):
        Normaliser((0.0,), (0.0,))
    assert Normaliser.from_json(Normaliser.identity(2).to_json()) == Normaliser.identity(2)
