"""The curves beside the temperature: antisymmetry, monotony, planted truths, netcal as oracle."""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit

from ensemble_rm import Calibration
from ensemble_rm.aggregation import lcb, mean
from ensemble_rm.calibration import CalibrationData, ScoredPairs, fit_temperature
from ensemble_rm.calibration.calibration import fit_calibration
from ensemble_rm.calibration.calibrator import CALIBRATORS
from ensemble_rm.calibration.methods.bbq import fit_bbq
from ensemble_rm.calibration.methods.binning import StepCurve
from ensemble_rm.calibration.methods.histogram import fit_histogram
from ensemble_rm.calibration.methods.isotonic import LinearCurve, fit_isotonic
from ensemble_rm.calibration.methods.power import PowerCurve, fit_power
from ensemble_rm.calibration.methods.temperature import margin_nll
from ensemble_rm.errors import (
    NoPositiveTemperatureError,
    OptionError,
    SchemaError,
    SeparableError,
    TooFewJudgmentsError,
)

METHODS = ("temperature", "power", "isotonic", "histogram", "bbq")
FITS = {"histogram": fit_histogram, "bbq": fit_bbq}
each_method = pytest.mark.parametrize("method", METHODS)


def planted(
    n: int = 2000, seed: int = 0, a: float = 0.8, gamma: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, n)
    p = expit(a * np.sign(x) * np.abs(x) ** gamma)
    return x, (rng.random(n) < p).astype(float)


def data(x: np.ndarray, y: np.ndarray, w: np.ndarray, temperature: float = 1.0) -> CalibrationData:
    return CalibrationData(x, y, w, temperature)


def scored(n: int = 600, *, soft: bool = True) -> ScoredPairs:
    rng = np.random.default_rng(3)
    x, y = planted(n)
    if soft:
        y[:60], y[60:90] = 0.5, 0.75
    x[-5:] = 0
    second = rng.normal(size=(n, 3))
    first = second + x[:, None] + rng.normal(0, 0.3, (n, 3))
    first[-5:] = second[-5:]
    w = np.where(np.arange(n) % 3 == 0, 2.0, 1.0) if soft else np.ones(n)
    return ScoredPairs(first, second, y, w, np.arange(n) // 2)


@lru_cache
def calibrated(method: str) -> Calibration:
    return fit_calibration(scored(), lcb(0.5), method=method)


MARGINS = arrays(np.float64, 30, elements=st.floats(-1e6, 1e6))


@each_method
@given(MARGINS)
def test_both_orders_sum_to_one(method: str, x: np.ndarray) -> None:
    p, q = calibrated(method).probability(x), calibrated(method).probability(-x)
    np.testing.assert_allclose(p + q, 1, rtol=0, atol=1e-15)
    assert ((p >= 0) & (p <= 1)).all()
    if method != "temperature":
        assert (p + q == 1).all()
    assert calibrated(method).probability([0.0])[0] == 0.5
    assert np.isnan(calibrated(method).probability([np.nan])[0])


@pytest.mark.parametrize("method", ["temperature", "power", "isotonic"])
@given(MARGINS)
def test_a_larger_margin_is_never_less_probable(method: str, x: np.ndarray) -> None:
    assert (np.diff(calibrated(method).probability(np.sort(x))) >= 0).all()


@each_method
def test_json_holds_the_whole_curve(method: str) -> None:
    calibration = calibrated(method)
    again = Calibration.from_json(json.loads(json.dumps(calibration.to_json())))
    assert again == calibration
    x = np.linspace(-20, 20, 2001)
    np.testing.assert_array_equal(again.probability(x), calibration.probability(x))
    assert calibration.temperature == calibrated("temperature").temperature


def test_what_was_stored_before_there_were_methods_is_a_temperature() -> None:
    said = calibrated("temperature").to_json()
    for new in ("method", "curve", "slices", "ties"):
        del said[new]
    assert Calibration.from_json(said) == calibrated("temperature")


@each_method
def test_sides_do_not_matter(method: str) -> None:
    pairs = scored()
    flip = np.random.default_rng(5).random(len(pairs)) < 0.5
    turned = ScoredPairs(
        np.where(flip[:, None], pairs.second, pairs.first),
        np.where(flip[:, None], pairs.first, pairs.second),
        np.where(flip, 1 - pairs.targets, pairs.targets),
        pairs.weights,
        pairs.groups,
    )
    x = np.linspace(-8, 8, 400)
    one, two = (fit_calibration(p, lcb(0.5), method=method) for p in (pairs, turned))
    np.testing.assert_allclose(one.probability(x), two.probability(x), atol=1e-6)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "bbq"])
def test_a_weight_of_two_is_a_judgment_twice_and_a_tie_half_of_each(method: str) -> None:
    """But for BBQ, which counts judgments when it chooses its numbers of bins."""
    x, y = planted(400)
    rows = np.repeat(np.arange(400), np.where(np.arange(400) < 100, 2, 1))
    w = np.where(np.arange(400) < 100, 2.0, 1.0)
    tied = np.where(np.arange(400) >= 350, 0.5, y)

    def ask(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        pairs = ScoredPairs(x[:, None], 0 * x[:, None], y, w, np.arange(len(x)))
        return fit_calibration(pairs, mean(), method=method).probability(np.linspace(-5, 5, 99))

    np.testing.assert_allclose(ask(x, y, w), ask(x[rows], y[rows], np.ones(500)), atol=1e-5)
    halves = np.concatenate([np.arange(350), np.arange(350, 400), np.arange(350, 400)])
    labels = np.concatenate([y[:350], np.ones(50), np.zeros(50)])
    weights = np.concatenate([np.ones(350), np.full(100, 0.5)])
    np.testing.assert_allclose(
        ask(x, tied, np.ones(400)), ask(x[halves], labels, weights), atol=1e-5
    )


@each_method
def test_refusals_are_those_of_the_temperature(method: str) -> None:
    x, y = planted(200)

    def fit(x: np.ndarray, y: np.ndarray) -> Calibration:
        pairs = ScoredPairs(x[:, None], 0 * x[:, None], y, np.ones(len(x)), np.arange(len(x)))
        return fit_calibration(pairs, mean(), method=method)

    with pytest.raises(TooFewJudgmentsError):
        fit(x[:40], y[:40])
    with pytest.raises(SeparableError):
        fit(x, (x > 0).astype(float))
    with pytest.raises(NoPositiveTemperatureError):
        fit(x, 1 - y)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(OptionError, match=r"'platt'.*isotonic"):
        fit_calibration(scored(), mean(), method="platt")


@each_method
def test_ties_are_counted(method: str) -> None:
    calibration, margins = calibrated(method), scored().margins(lcb(0.5))
    p = calibration.probability(np.unique(np.abs(margins)))
    if method in ("temperature", "power"):
        assert calibration.ties == 0
    else:
        assert calibration.ties == len(p) - len(np.unique(p)) > 0


def test_count_ties() -> None:
    step = StepCurve((1.0,), (0.6, 0.7))
    margins = [0.2, -0.2, 0.3, 2.0, 5.0, -6.0]
    assert CALIBRATORS["histogram"].count_ties(step, margins) == 3
    # A curve that rises strictly ties nothing, also where floats no longer show it.
    assert CALIBRATORS["power"].count_ties(PowerCurve(1.0, 1.0), [50.0, 60.0]) == 0


# Power ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "gamma"), [(0.8, 1.0), (1.0, 0.5), (0.4, 2.0)])
def test_a_planted_power_is_recovered(a: float, gamma: float) -> None:
    x, y = planted(30_000, a=a, gamma=gamma)
    found = fit_power(data(x, y, np.ones(len(x))))
    assert found.gamma == pytest.approx(gamma, rel=0.1)
    assert found.a == pytest.approx(a, rel=0.1)


def test_a_power_fits_no_worse_than_a_temperature_or_its_neighbours() -> None:
    x, y = planted(800, gamma=0.6)
    w = np.random.default_rng(2).uniform(0.5, 2, 800)

    def loss(a: float, gamma: float) -> float:
        return margin_nll(a * np.sign(x) * np.abs(x) ** gamma, y, w, 1.0)

    found = fit_power(data(x, y, w))
    best = loss(found.a, found.gamma)
    assert best <= fit_temperature(x, y, weights=w).nll + 1e-12
    for da in (0.98, 1.02):
        for dg in (0.98, 1.02):
            assert best <= loss(found.a * da, found.gamma * dg)


@given(st.floats(1e-6, 1e6))
def test_a_power_does_not_know_the_margins_unit(scale: float) -> None:
    x, y = planted(300, gamma=0.7)
    one, two = (fit_power(data(s * x, y, np.ones(300))) for s in (1.0, scale))
    assert one.gamma == pytest.approx(two.gamma, rel=1e-4)
    np.testing.assert_allclose(one.probability(x), two.probability(scale * x), atol=1e-5)


@pytest.mark.parametrize("n", [100, 1000])
def test_heavy_tails_hide_no_optimum(n: int) -> None:
    """At large powers one margin outweighs all others; the optimum at small ones is found."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x = rng.standard_t(3, n)
        y = (rng.random(n) < expit(x)).astype(float)
        w = np.ones(n)
        found = fit_power(data(x, y, w))
        best = margin_nll(found.a * np.sign(x) * np.abs(x) ** found.gamma, y, w, 1.0)
        others = (
            margin_nll(a * np.sign(x) * np.abs(x) ** gamma, y, w, 1.0)
            for a in np.geomspace(0.05, 20, 25)
            for gamma in np.geomspace(0.1, 4, 25)
        )
        assert best <= min(others) + 1e-9


def test_a_power_that_runs_away_is_refused() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, 1000)
    small = np.abs(x) < 0.1
    against = np.where(rng.random(1000) < 0.9, x > 0, x < 0).astype(float)
    # Small margins tell more than large ones.
    y = np.where(small, x > 0, against).astype(float)
    with pytest.raises(NoPositiveTemperatureError, match="γ to 0"):
        fit_power(data(x, y, np.ones(1000)))
    # Only the largest margin tells anything.
    x = np.concatenate([np.repeat([1.0], 200), np.repeat([1.05], 50)])
    y = np.concatenate([np.tile([0.0, 1.0], 100), np.r_[np.ones(49), 0]])
    with pytest.raises(SeparableError, match="γ to infinity"):
        fit_power(data(x, y, np.ones(250)))


# Isotonic ------------------------------------------------------------------------------------


def test_isotonic_is_scikit_learns_on_both_orientations() -> None:
    from sklearn.isotonic import IsotonicRegression

    x, y = planted(500)
    y[:50] = 0.5
    w = np.random.default_rng(1).uniform(0.5, 2, 500)
    ours = fit_isotonic(data(x, y, w))
    theirs = IsotonicRegression(out_of_bounds="clip")
    theirs.fit(np.r_[x, -x], np.r_[y, 1 - y], sample_weight=np.r_[w, w])
    grid = np.linspace(-9, 9, 3001)
    np.testing.assert_allclose(ours.probability(grid), theirs.predict(grid), atol=1e-12)


def test_isotonic_fits_its_judgments_best_among_the_rising_curves() -> None:
    x, y = planted(500)
    ours = fit_isotonic(data(x, y, np.ones(500))).probability(x)
    for other in (expit(0.8 * x), expit(2 * x), (x > 0).astype(float)):
        assert ((ours - y) ** 2).sum() <= ((other - y) ** 2).sum()


# netcal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["histogram", "bbq"])
def test_a_binning_curve_is_netcals_map(method: str) -> None:
    from netcal.binning import BBQ, HistogramBinning

    # Won first: BBQ adds its likelihoods in float32, so that their order shows in the sixth digit.
    x, y = (side[np.argsort(-planted(700)[1], kind="stable")] for side in planted(700))
    t = 1.3
    ours = FITS[method](data(x, y, np.ones(700), t))
    kind = {"histogram": HistogramBinning, "bbq": BBQ}[method]
    theirs = kind().fit(expit(np.r_[x, -x] / t), np.r_[y, 1 - y].astype(int))
    grid = np.random.default_rng(0).normal(0, 4, 5000)
    p, q = (theirs.transform(expit(side * grid / t)) for side in (1, -1))
    np.testing.assert_allclose(ours.probability(grid), 0.5 * (p + 1 - q), atol=1e-12)
    np.testing.assert_allclose(p + q, 1, atol=1e-9)  # so that nothing is averaged away
    assert len(ours.values) > 3


def test_a_histogram_is_the_share_of_wins_in_its_bins() -> None:
    """By hand, with votes and weights that netcal does not know."""
    x, y = planted(900)
    y[:100] = np.tile([0.5, 0.75], 50)
    w = np.where(np.arange(900) % 2 == 0, 3.0, 1.5)
    curve = fit_histogram(data(x, y, w, 1.0))
    bins = np.minimum(np.floor(expit(np.abs(x)) * 10).astype(int), 9)
    wins = np.where(x > 0, y, 1 - y)
    for b in range(5, 10):
        inside = bins == b
        share = (w * wins)[inside].sum() / w[inside].sum()
        got = curve.probability(np.abs(x[inside]))
        np.testing.assert_allclose(got, share, atol=1e-9)


def test_weights_that_cannot_be_copied_are_refused_by_name() -> None:
    x, y = planted(300)
    w = np.random.default_rng(0).uniform(0.1, 3, 300)
    with pytest.raises(OptionError, match=r"'bbq' counts judgments.*isotonic"):
        fit_bbq(data(x, y, w, 1.0))
    curve = fit_histogram(data(x, y, np.full(300, 0.37), 1.0))
    assert curve == fit_histogram(data(x, y, np.ones(300), 1.0))


def test_bbq_draws_no_bar(capfd: pytest.CaptureFixture[str]) -> None:
    x, y = planted(300)
    fit_bbq(data(x, y, np.ones(300), 1.0))
    heard = capfd.readouterr()
    assert heard.out == heard.err == ""


# pyro's own, about a method that netcal calls.
pyro = pytest.mark.filterwarnings("ignore:independent is deprecated:DeprecationWarning")


@pyro
@pytest.mark.parametrize("name", ["LogisticCalibration", "BetaCalibration", "TemperatureScaling"])
def test_netcals_parametric_calibrators_made_odd_are_the_temperature(name: str) -> None:
    """Fitted on both orientations, logistic has no intercept and beta has a = b.

    On float32 all three change nothing, which our fit, always float64, cannot do.
    """
    from netcal import scaling

    x, y = planted(1500, a=1 / 1.7)
    both, labels = np.r_[x, -x], np.r_[y, 1 - y].astype(np.int64)
    ours = expit(both / fit_temperature(x, y).temperature)
    theirs = getattr(scaling, name)()
    theirs.fit(expit(both), labels)
    np.testing.assert_allclose(np.ravel(theirs.transform(expit(both))), ours, atol=1e-5)

    narrow = expit(both).astype(np.float32)
    idle = getattr(scaling, name)()
    idle.fit(narrow, labels)
    np.testing.assert_allclose(np.ravel(idle.transform(narrow)), narrow, atol=1e-6)
    assert np.abs(narrow - ours).max() > 0.05
    again = fit_temperature(x.astype(np.float32), y.astype(np.float32))
    np.testing.assert_allclose(expit(both / again.temperature), ours, atol=1e-6)


@pyro
def test_netcals_temperature_is_the_inverse_of_ours() -> None:
    from netcal.scaling import TemperatureScaling

    x, y = planted(1500, a=1 / 1.7)
    theirs = TemperatureScaling()
    theirs.fit(expit(np.r_[x, -x]), np.r_[y, 1 - y].astype(np.int64))
    fit = fit_temperature(x, y)
    assert fit.low < 1.7 < fit.high
    assert float(theirs.temperature[0]) == pytest.approx(1 / fit.temperature, rel=1e-4)


# Curves --------------------------------------------------------------------------------------


def test_curves_that_are_none_are_refused() -> None:
    for make in (
        lambda: PowerCurve(0.0, 1.0),
        lambda: PowerCurve(1.0, float("inf")),
        lambda: LinearCurve((2.0, 1.0), (0.6, 0.7)),
        lambda: LinearCurve((1.0,), (0.6, 0.7)),
        lambda: StepCurve((1.0,), (0.6, 1.2)),
        lambda: StepCurve((1.0,), (0.6,)),
    ):
        with pytest.raises(OptionError):
            make()
    for read in (
        lambda: PowerCurve.from_json({"shape": "spline", "a": 1.0, "gamma": 1.0}),
        lambda: PowerCurve.from_json({"shape": "power", "a": 0.0, "gamma": 1.0}),
        lambda: Calibration.from_json(calibrated("power").to_json() | {"curve": None}),
        lambda: Calibration.from_json(calibrated("power").to_json() | {"method": "temperature"}),
        lambda: Calibration.from_json(calibrated("power").to_json() | {"method": "spline"}),
    ):
        with pytest.raises(SchemaError):
            read()
    for curve in (PowerCurve(2.0, 0.5), LinearCurve((1.0,), (0.6,)), StepCurve((), (0.6,))):
        assert type(curve).from_json(json.loads(json.dumps(curve.to_json()))) == curve
    with pytest.raises(OptionError, match="isotonic"):
        Calibration(mean(), calibrated("power").fit, 1.0, "", "", method="isotonic")
