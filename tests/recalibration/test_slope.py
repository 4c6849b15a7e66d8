"""The slope of judgments that hardly follow their margins, against numerical integration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from ensemble_rm.calibration import fit_temperature
from ensemble_rm.errors import SeparableError
from ensemble_rm.evidence.dated_margins import DatedMargins
from ensemble_rm.recalibration.fitting import fit_positive, fit_signed


def judged(slope: float, n: int, seed: int) -> DatedMargins:
    rng = np.random.default_rng(seed)
    margins = rng.normal(size=n)
    targets = (rng.random(n) < 1 / (1 + np.exp(-slope * margins))).astype(float)
    places = np.arange(n)
    return DatedMargins(
        margins,
        margins[:, None],
        targets,
        np.ones(n),
        places,
        places.astype(float),
        np.full(n, -1, np.int32),
    )


@settings(max_examples=40, deadline=None)
@given(slope=st.floats(-1.5, 0.4), n=st.integers(60, 600), seed=st.integers(0, 2**31))
def test_mean_spread_and_bounds_are_those_of_the_normal_cut_off_at_zero(
    slope: float, n: int, seed: int
) -> None:
    data = judged(slope, n, seed)
    beta, fit = fit_signed(data)
    se = fit.log_se * abs(beta)
    found = fit_positive(data)
    if beta >= 6 * se:
        assert found == fit
        return
    shift = max(beta, 0.0)  # of the density's peak above 0: keeps the integrand near 1

    def density(x: float) -> float:
        return float(np.exp(-((x - beta) ** 2 - (shift - beta) ** 2) / (2 * se**2)))

    reach = shift + 12 * se
    whole, first, second = (
        quad(lambda x, p=p: x**p * density(x), 0, reach, points=[shift], epsabs=0, limit=200)[0]
        for p in (0, 1, 2)
    )
    mean = first / whole
    assert 1 / found.temperature == pytest.approx(mean, rel=1e-5)
    assert found.log_se * mean == pytest.approx(np.sqrt(second / whole - mean**2), rel=1e-3)
    for bound, mass in ((1 / found.high, 0.025), (1 / found.low, 0.975)):
        part = quad(density, 0, bound, epsabs=0, limit=200)[0]
        assert part / whole == pytest.approx(mass, abs=1e-5)


def test_turned_margins_turn_the_slope() -> None:
    data = judged(0.8, 400, 1)
    up, fit = fit_signed(data)
    down, same = fit_signed(replace(data, margins=-data.margins))
    assert down == -up and same == fit
    assert fit == fit_temperature(data.margins, data.targets, groups=data.groups)


def test_the_likelihood_has_its_maximum_at_the_signed_slope() -> None:
    data = judged(-0.5, 500, 2)
    beta, _ = fit_signed(data)

    def nll(b: float) -> float:
        return float(np.logaddexp(0, -(2 * data.targets - 1) * b * data.margins).sum())

    assert beta < 0
    assert nll(beta) < min(nll(beta - 1e-3), nll(beta + 1e-3), nll(0.0))


def test_a_clear_contradiction_says_nearly_a_coin() -> None:
    found = fit_positive(judged(-1.5, 2000, 3))
    assert found.temperature > 50
    assert 0.9 < found.log_se <= 1.0  # of an exponential it is 1
    assert found.low < found.temperature < found.high
    steep = judged(0.0, 300, 4)
    steep = replace(steep, targets=(steep.margins < 0).astype(float))
    with pytest.raises(SeparableError):
        fit_positive(steep)


def test_far_above_zero_nothing_is_cut_off() -> None:
    data = judged(1.0, 2000, 5)
    assert fit_positive(data) == fit_signed(data)[1]
    assert norm.pdf(6) / norm.cdf(6) < 1e-8
