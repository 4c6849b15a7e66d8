"""Caps on annotators and days, and the test of annotators: laws, exact tails, planted attacks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import expit

from ensemble_rm.aggregation import mean
from ensemble_rm.calibration.methods.temperature import clustered_meat, fit_temperature
from ensemble_rm.errors import OptionError
from ensemble_rm.evidence.dated_margins import DAY, DatedMargins, join_margins
from ensemble_rm.evidence.window import arrival_days
from ensemble_rm.judgments.database.chain import Chain, Link
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.recalibration.annotator_test import (
    annotator_p_values,
    cap_shares,
    check_annotators,
    lower_tail,
)
from ensemble_rm.recalibration.decision import decide
from ensemble_rm.recalibration.options import DecisionOptions
from tests.support.recalibration_runs import calibrated, judged, margins, stored

OPTIONS = DecisionOptions()


def by_annotators(data: DatedMargins, count: int) -> DatedMargins:
    return replace(data, annotators=np.arange(len(data)) % count)


def one_account(data: DatedMargins, kind: str, n: int, *, seed: int = 5) -> DatedMargins:
    """The judgments, and n of a further account in one hour after them."""
    bad = margins(1.2, n, seed=seed, days=1 / 24, start=180)
    targets = {
        "agreeing": (bad.margins > 0).astype(float),
        "opposing": (bad.margins < 0).astype(float),
        "inverting": 1 - bad.targets,
        "honest": bad.targets,
    }[kind]
    code = int(data.annotators.max()) + 1
    return join_margins([data, replace(bad, targets=targets, annotators=np.full(n, code))])


# Caps ------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.tuples(st.integers(0, 7), st.floats(0.01, 100)), min_size=1, max_size=60)


@given(rows=WEIGHTS, share=st.floats(0.05, 1))
def test_no_annotator_has_more_than_the_share_and_nobody_gains(
    rows: list[tuple[int, float]], share: float
) -> None:
    codes = np.array([code for code, _ in rows])
    weights = np.array([weight for _, weight in rows])
    capped, remark = cap_shares(weights, codes, share)
    assert (capped <= weights * (1 + 1e-12)).all() and (capped > 0).all()
    if remark:
        np.testing.assert_array_equal(capped, weights)
        assert len(set(codes)) * share < 1
        return
    shares = np.bincount(codes, capped) / capped.sum()
    assert shares.max() <= share * (1 + 1e-6)
    # Annotators below the cap keep their weight, and all capped ones have the same total.
    totals, before = np.bincount(codes, capped), np.bincount(codes, weights)
    reduced = totals < before * (1 - 1e-9)
    if reduced.any():
        np.testing.assert_allclose(totals[reduced], totals[reduced][0])
        assert totals.max() <= totals[reduced][0] * (1 + 1e-9)


@given(rows=WEIGHTS, more=st.floats(1, 50), share=st.floats(0.13, 1))
def test_more_weight_never_lowers_an_annotators_total(
    rows: list[tuple[int, float]], more: float, share: float
) -> None:
    # All eight annotators take part, so that the cap is on.
    codes = np.array([*range(8), *(code for code, _ in rows)])
    weights = np.array([*[1.0] * 8, *(weight for _, weight in rows)])
    before = np.bincount(codes, cap_shares(weights, codes, share)[0])
    grown = np.where(codes == 0, weights * more, weights)
    after = np.bincount(codes, cap_shares(grown, codes, share)[0])
    assert (after >= before * (1 - 1e-9)).all()


def test_the_cap_is_off_with_few_annotators_or_missing_ids() -> None:
    weights = np.ones(9)
    for codes, reason in ((np.arange(9) % 4, "fewer than"), (np.arange(-1, 8), "have none")):
        capped, remark = cap_shares(weights, codes, 0.2)
        np.testing.assert_array_equal(capped, weights)
        assert reason in remark
    data = margins(1.2, 600, seed=1)
    assert any("cap on annotators is off" in r for r in _report(data).remarks)
    with pytest.raises(OptionError, match="share"):
        cap_shares(weights, np.arange(9), 0.0)


def _report(data: DatedMargins):  # type: ignore[no-untyped-def]
    return check_annotators(data, share=0.2, day_share=0.2, level=0.01)[1]


# Test ------------------------------------------------------------------------------------------


def test_tails_are_those_of_the_exact_distribution() -> None:
    rng = np.random.default_rng(1)
    for slope in (-1.5, 0.4, 1.0):
        x = rng.normal(0, 2, 12)
        p = expit(slope * x)
        outcomes = np.array(list(itertools.product((0, 1), repeat=len(x))))
        chances = np.where(outcomes == 1, p, 1 - p).prod(axis=1)
        sums = outcomes @ x
        for observed in outcomes[rng.integers(0, len(outcomes), 40)]:
            exact = chances[sums <= observed @ x + 1e-9].sum()
            if 1e-6 < exact < 0.3:
                tail = lower_tail(x, observed.astype(float), slope)
                assert abs(math.log(tail / exact)) < 0.7
        least = np.where(x > 0, 0.0, 1.0)
        chance = np.where(x > 0, 1 - p, p).prod()
        assert lower_tail(x, least, slope) == pytest.approx(chance)


def test_honest_annotators_are_rejected_at_most_at_the_level() -> None:
    runs = 60
    wrong = 0
    for seed in range(runs):
        data = by_annotators(margins(1.2, 1000, seed=100 + seed), 20)
        wrong += bool(_report(data).rejected)
    # At a level of .01, more than 4 of 60 has a probability below 5e-4.
    assert wrong <= 4
    codes, p_values = annotator_p_values(by_annotators(margins(1.2, 400, seed=3), 4), 1 / 1.2)
    assert list(codes) == [0, 1, 2, 3] and (p_values > 0.01).all()


@pytest.mark.parametrize("volume", [150, 1600, 15_000])
@pytest.mark.parametrize("kind", ["agreeing", "opposing", "inverting"])
def test_one_account_does_not_move_the_temperature(kind: str, volume: int) -> None:
    incumbent = calibrated(1.0).calibration
    data = by_annotators(margins(1.6, 3000, seed=1), 20)
    honest = decide(data, mean(), incumbent, options=OPTIONS).calibration
    decision = decide(one_account(data, kind, volume), mean(), incumbent, options=OPTIONS)
    assert honest is not None and decision.calibration is not None
    assert abs(math.log(decision.calibration.temperature / honest.temperature)) <= 0.15
    assert decision.annotators is not None and decision.annotators.rejected == ("20",)
    assert "left out, judging unlike the others: 20" in decision.reason


def test_too_many_rejected_annotators_are_an_alarm() -> None:
    data = by_annotators(margins(1.171, 3000, seed=11), 10)
    # Four of ten invert: they may be right, and a person has to look.
    bad = np.isin(data.annotators, [0, 1, 2, 3])
    data = replace(data, targets=np.where(bad, 1 - data.targets, data.targets))
    incumbent = calibrated(1.0).calibration
    decision = decide(data, mean(), incumbent, options=OPTIONS)
    assert decision.answer == "rejected" and decision.calibration is None
    assert "--exclude-annotator" in decision.reason
    tolerant = decide(data, mean(), incumbent, options=replace(OPTIONS, max_rejected=1.0))
    assert tolerant.answer != "rejected"


def test_order_and_names_of_annotators_change_nothing() -> None:
    data = one_account(by_annotators(margins(1.171, 1200, seed=2), 8), "inverting", 300)
    rows = np.random.default_rng(0).permutation(len(data))
    kept, report = check_annotators(data, share=0.2, day_share=0.2, level=0.01)
    shuffled, again = check_annotators(data.take(rows), share=0.2, day_share=0.2, level=0.01)
    np.testing.assert_array_equal(kept[rows], shuffled)
    assert report.rejected == again.rejected == ("8",)
    assert report.rejected_share == pytest.approx(again.rejected_share)


# Two-way intervals -----------------------------------------------------------------------------


def test_intervals_over_prompts_and_annotators_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(4)
    score, prompts, people = rng.normal(size=300), rng.integers(0, 60, 300), np.arange(300) % 12

    def variance(groups: np.ndarray) -> float:
        sums = np.bincount(np.unique(groups, return_inverse=True)[1], score)
        return float((sums**2).sum()) * len(sums) / (len(sums) - 1)

    two_way = variance(prompts) + variance(people) - variance(prompts * 12 + people)
    meat, count, clusters = clustered_meat(score, prompts, people)
    assert meat == pytest.approx(max(two_way, variance(prompts)))
    assert (count, clusters) == (60, 12)
    alone = clustered_meat(score, prompts, None)
    for unused in (np.zeros(300, int), np.full(300, -1)):
        assert clustered_meat(score, prompts, unused) == alone


def test_annotators_who_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(6)
    people = np.arange(3000) % 10
    x = rng.normal(0, 2, 3000)
    slopes = np.linspace(0.2, 2.0, 10)[people]
    y = (rng.random(3000) < expit(slopes * x)).astype(float)
    alone, both = fit_temperature(x, y), fit_temperature(x, y, annotators=people)
    assert both.temperature == alone.temperature
    assert both.log_se > 1.5 * alone.log_se
    assert both.high / both.low > (alone.high / alone.low) ** 1.5


# Selection -------------------------------------------------------------------------------------


def test_excluded_annotators_are_not_read(tmp_path: Path) -> None:
    with stored(tmp_path / "judgments.db", judged(1.0, 50, seed=1)) as store:
        where = JudgmentFilter(without_annotator=("annotator 0", "annotator 3"))
        names = {row.annotator for row in store.observations(where)}
        assert names == {"annotator 1", "annotator 2", "annotator 4"}
        assert store.count(where) == len(list(store.read(where))) == 30
        assert store.count(JudgmentFilter(without_annotator="annotator 0")) == 40


def test_days_are_capped_as_annotators_are() -> None:
    data = margins(1.2, 1000, seed=9)
    days = (data.times / DAY / 20).astype(np.int64)
    late = margins(1.2, 2000, seed=10, days=1, start=181)
    both = join_margins([replace(data, days=days), replace(late, days=np.full(2000, 99))])
    weights, _ = cap_shares(both.weights, both.days, 0.2)
    assert weights[both.days == 99].sum() / weights.sum() == pytest.approx(0.2)


@given(rows=WEIGHTS, free=st.floats(0.1, 500), share=st.floats(0.05, 0.9))
def test_trusted_batches_are_not_capped(
    rows: list[tuple[int, float]], free: float, share: float
) -> None:
    codes = np.array([-1, *(code for code, _ in rows)])
    weights = np.array([free, *(weight for _, weight in rows)])
    capped, remark = cap_shares(weights, codes, share, exempt=True)
    assert capped[0] == free and (capped <= weights * (1 + 1e-12)).all() and (capped > 0).all()
    shares = np.bincount(codes[1:], capped[1:]) / capped.sum()
    assert not remark and shares.max() <= share * (1 + 1e-6)


def test_days_are_those_of_arrival_without_the_first_and_trusted_ones() -> None:
    start = datetime(2026, 1, 1, 12, tzinfo=UTC)
    times = [start, start, start + timedelta(days=3), start + timedelta(days=4)]
    links = [Link(i + 1, 1, 0, b"", b"", at) for i, at in enumerate(times)]
    first = int(start.timestamp() // 86400)
    assert arrival_days(Chain(tuple(links))) == {3: first + 3, 4: first + 4}
    assert arrival_days(Chain(tuple(links)), [4]) == {3: first + 3}
    # Judgments from before the chain are the store's first day.
    old = [Link(1, 1, 0, b"", b"", None), *links[2:]]
    assert arrival_days(Chain(tuple(old))) == {3: first + 3, 4: first + 4}
