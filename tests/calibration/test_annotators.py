"""Annotators' temperatures: planted ones recovered, shrinkage, coverage, odd annotators, sides."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import expit

from ensemble_rm.calibration import Reliability, fit_reliability, fit_temperature
from ensemble_rm.errors import CalibrationError, OptionError, TooFewJudgmentsError


def planted(
    logs: np.ndarray, counts: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(len(logs)), counts)
    x = rng.normal(0, 3, len(who))
    y = (rng.random(len(who)) < expit(x / np.exp(logs[who]))).astype(float)
    return x, y, [f"rater {i:03d}" for i in who]


def found_logs(found: Reliability) -> np.ndarray:
    return np.log([one.temperature for one in found.annotators])


def test_planted_reliabilities_are_recovered() -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(math.log(1.5), 0.6, 40)
    found = fit_reliability(*planted(logs, np.full(40, 400), 1))
    assert np.corrcoef(found_logs(found), logs)[0, 1] > 0.95
    assert found.spread == pytest.approx(logs.std(), rel=0.25)
    assert found.temperature == pytest.approx(math.exp(logs.mean()), rel=0.1)
    assert found.design_effect < 1.2


def test_shrunk_temperatures_lie_nearer_to_the_truth_than_own_ones_and_than_one_for_all() -> None:
    own_error = shrunk_error = one_error = 0.0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        logs = rng.normal(0.3, 0.5, 30)
        x, y, who = planted(logs, np.full(30, 60), seed + 100)
        shrunk = found_logs(fit_reliability(x, y, who))
        overall = math.log(fit_temperature(x, y).temperature)
        for i in range(30):
            rows = slice(60 * i, 60 * i + 60)
            try:
                own = math.log(fit_temperature(x[rows], y[rows]).temperature)
            except CalibrationError:
                own = overall
            own_error += (own - logs[i]) ** 2
            shrunk_error += (shrunk[i] - logs[i]) ** 2
            one_error += (overall - logs[i]) ** 2
    assert shrunk_error < 0.9 * own_error
    assert shrunk_error < 0.5 * one_error


def test_intervals_cover_planted_temperatures() -> None:
    within = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        logs = rng.normal(0.3, 0.5, 40)
        found = fit_reliability(*planted(logs, np.full(40, 80), seed + 50))
        for one, truth in zip(found.annotators, np.exp(logs), strict=True):
            within.append(one.low <= truth <= one.high)
    assert 0.92 < np.mean(within) < 0.985


def test_annotators_who_are_alike_get_one_temperature() -> None:
    spreads = []
    for seed in range(10):
        found = fit_reliability(*planted(np.full(20, 0.4), np.full(20, 100), seed))
        spreads.append(found.spread)
        assert np.ptp(found_logs(found)) < 0.5
    assert np.median(spreads) < 0.1


def test_few_verdicts_are_drawn_far_and_many_hardly() -> None:
    logs = np.concatenate([np.linspace(-0.5, 1.0, 20), [1.2, 1.2]])
    counts = np.array([200] * 20 + [3000, 3])
    found = fit_reliability(*planted(logs, counts, 0))
    many, few = found_logs(found)[-2:]
    assert many == pytest.approx(1.2, abs=0.15)
    assert abs(few - math.log(found.temperature)) < 0.5 * abs(many - math.log(found.temperature))


def test_who_contradicts_and_who_always_agrees_have_a_temperature_too() -> None:
    x, y, who = planted(np.zeros(10), np.full(10, 200), 0)
    rows = {name: np.array([w == name for w in who]) for name in ("rater 000", "rater 001")}
    y[rows["rater 000"]] = (x[rows["rater 000"]] < 0) * 1.0
    y[rows["rater 001"]] = (x[rows["rater 001"]] > 0) * 1.0
    found = fit_reliability(x, y, who)
    order = sorted(found.annotators, key=lambda one: one.temperature)
    assert order[0].name == "rater 001"
    assert order[-1].name == "rater 000"
    assert order[-1].temperature > 5 * found.temperature
    assert math.isfinite(order[-1].high)
    assert order[0].low > 0


def test_clusters_widen_the_intervals() -> None:
    """Each verdict five times: as one prompt each they tell what they told once."""
    logs = np.linspace(-0.3, 0.8, 15)
    x, y, who = planted(logs, np.full(15, 80), 0)
    once = fit_reliability(x, y, who)
    groups = np.repeat(np.arange(len(x)), 5)
    many = np.repeat(x, 5), np.repeat(y, 5), [w for w in who for _ in range(5)]
    five = fit_reliability(*many, groups=groups)
    blind = fit_reliability(*many)
    assert five.design_effect == pytest.approx(5 * once.design_effect, rel=0.1)
    assert found_logs(five) == pytest.approx(found_logs(once), abs=0.02)
    widths = [[math.log(one.high / one.low) for one in f.annotators] for f in (once, five, blind)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert np.mean(widths[2]) < 0.7 * np.mean(widths[0])


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 20))
def test_sides_order_and_units(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    x, y, who = planted(np.array([-0.5, 0.3, 1.0]), np.array([60, 50, 40]), 3)
    found = fit_reliability(x, y, who)
    flip, order = rng.random(150) < 0.5, rng.permutation(150)
    turned = fit_reliability(
        scale * np.where(flip, -x, x)[order],
        np.where(flip, 1 - y, y)[order],
        [who[i] for i in order],
    )
    assert found_logs(turned) == pytest.approx(found_logs(found) + math.log(scale), abs=1e-4)


def test_it_says_what_an_annotator_will_prefer() -> None:
    found = fit_reliability(*planted(np.array([-1.0, 1.0]), np.array([300, 300]), 0))
    p = found.probability([1.0, 1.0, 1.0], ["rater 000", "new", "rater 001"])
    assert p[0] > p[1] > p[2] > 0.5
    assert p[1] == pytest.approx(expit(1 / found.temperature))
    assert Reliability.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(OptionError):
        found.probability([1.0], [])


def test_refusals() -> None:
    x, y, who = planted(np.zeros(2), np.array([100, 100]), 0)
    with pytest.raises(OptionError, match="1 annotators"):
        fit_reliability(x, y, ["a"] * 200)
    with pytest.raises(OptionError, match="199"):
        fit_reliability(x, y, who[:-1])
    with pytest.raises(OptionError, match="groups"):
        fit_reliability(x, y, who, groups=np.zeros(3))
    with pytest.raises(TooFewJudgmentsError):
        fit_reliability(x[:20], y[:20], who[:20])


def test_on_real_experts(shared_data: Path) -> None:
    """Length as the reward; 65 experts of mtbench, most of whom judged few pairs."""
    lines = (shared_data / "mtbench_votes.jsonl").read_text(encoding="utf-8").splitlines()
    x, y, who, prompts = [], [], [], []
    for row in map(json.loads, lines):
        for vote in row["annotators"]:
            x.append(math.log1p(len(row["chosen"])) - math.log1p(len(row["rejected"])))
            y.append({"chosen": 1.0, "rejected": 0.0, "tie": 0.5}[vote["vote"]])
            who.append(vote["id"])
            prompts.append(row["prompt"])
    groups = np.unique(prompts, return_inverse=True)[1]
    found = fit_reliability(x, y, who, groups=groups)
    assert len(found.annotators) == len(set(who))
    for one in found.annotators:
        assert 0 < one.low <= one.temperature <= one.high < math.inf
