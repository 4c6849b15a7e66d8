"""Raters: agreement by hand, false alarms over healthy months, planted changes, invariances."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import beta as beta_distribution, fisher_exact

from ensemble_rm import Judgment
from ensemble_rm.drift import AnchorVote, anchor_votes, rater_drift
from ensemble_rm.drift.raters import PANEL, RaterDrift
from ensemble_rm.errors import DataError, OptionError

MONTHS = tuple(f"2026-{m:02d}" for m in range(1, 7))


def months(
    seed: int,
    *,
    careless: float = 0.0,
    everyone: float = 0.0,
    biased: float = 0.0,
    pairs: int = 60,
    annotators: int = 5,
) -> list[AnchorVote]:
    """Pairs of all difficulties, judged by all each month; in the last one something changes.

    careless: how often annotator 0 votes at random; everyone: how often all do; biased: how often
    all take what is shown first.
    """
    rng = np.random.default_rng(seed)
    clear = rng.normal(0, 2, pairs)
    ties = rng.uniform(0.05, 0.25, pairs)
    found = []
    for month in MONTHS:
        changed = month == MONTHS[-1]
        for a in range(annotators):
            swapped, u, coin = rng.random(pairs) < 0.5, rng.random(pairs), rng.random((3, pairs))
            won = (u < 1 / (1 + np.exp(-clear))).astype(float)
            lost = (careless if a == 0 else 0.0) if changed else 0.0
            lost = max(lost, everyone) if changed else 0.0
            won = np.where(coin[0] < lost, (coin[1] < 0.5) * 1.0, won)
            won = np.where(coin[2] < ties, 0.5, won)
            shown = np.where(swapped, 1 - won, won)
            if changed:
                shown = np.where((coin[1] < biased) & (won != 0.5), 1.0, shown)
            found += [
                AnchorVote(f"pair {i}", f"rater {a}", month, float(shown[i]), bool(swapped[i]))
                for i in range(pairs)
            ]
    return found


def test_agreement_and_position_by_hand() -> None:
    votes = [
        AnchorVote("p", "a", "2026-01", 1.0),
        AnchorVote("p", "b", "2026-01", 0.0, swapped=True),  # the same verdict, shown second
        AnchorVote("p", "c", "2026-01", 0.5),
        AnchorVote("q", "a", "2026-01", 1.0),
        AnchorVote("q", "b", "2026-01", 0.0),  # split: no anchor verdict
        AnchorVote("p", "a", "2026-02", 0.0, swapped=True),
        AnchorVote("p", "b", "2026-02", 0.0),
        AnchorVote("q", "b", "2026-02", 1.0),
        AnchorVote("p", "c", "2026-02", 0.5),
    ]
    cells = {(cell.annotator, cell.month): cell for cell in rater_drift(votes).cells}
    panel = cells[PANEL, "2026-02"]
    assert (panel.votes, panel.compared, panel.agreed) == (4, 3, 1)
    assert (panel.first, panel.decided) == (1, 3)
    assert cells["a", "2026-02"].agreement == 1.0
    assert cells["b", "2026-02"].agreement == 0.0
    assert cells["b", "2026-02"].first_share == 0.5
    assert cells[PANEL, "2026-01"].compared == 0
    assert math.isnan(cells["a", "2026-01"].agreement)
    assert math.isnan(cells["c", "2026-02"].first_share)
    assert rater_drift(votes).tests == ()  # too few for any


def test_an_annotators_test_is_fishers() -> None:
    found = rater_drift(months(0))
    cells = [c for c in found.cells if c.annotator == "rater 1" and c.compared]
    now, past = cells[-1], cells[:-1]
    agreed, compared = sum(c.agreed for c in past), sum(c.compared for c in past)
    table = [[now.agreed, now.compared - now.agreed], [agreed, compared - agreed]]
    test = next(t for t in found.tests if (t.kind, t.annotator) == ("agreement", "rater 1"))
    assert test.p == pytest.approx(fisher_exact(table).pvalue)
    assert test.adjusted >= test.p


def test_healthy_months_alarm_at_most_at_the_stated_share() -> None:
    alarms = sum(rater_drift(months(seed)).alarm for seed in range(200))
    assert beta_distribution.ppf(0.01, alarms or 1, 200 - alarms + 1) <= 0.05


@pytest.mark.parametrize("seed", range(3))
def test_one_careless_annotator_is_named(seed: int) -> None:
    found = rater_drift(months(seed, careless=1.0))
    alarmed = {(t.kind, t.annotator) for t in found.tests if t.alarm}
    assert ("agreement", "rater 0") in alarmed
    assert not alarmed & {("agreement", f"rater {a}") for a in range(1, 5)}
    test = next(t for t in found.tests if (t.kind, t.annotator) == ("agreement", "rater 0"))
    assert test.now < test.before


def test_a_change_of_all_that_none_shows_alone_is_seen_in_the_panel() -> None:
    panel = single = 0
    for seed in range(10):
        found = rater_drift(months(seed, everyone=0.45, pairs=100, annotators=8))
        alarmed = {t.annotator for t in found.tests if t.alarm and t.kind == "agreement"}
        panel += PANEL in alarmed
        single += len(alarmed - {PANEL})
    assert panel >= 8
    assert single <= 10  # of 80


def test_position_bias_is_found_in_its_month() -> None:
    votes = months(0, biased=0.4)
    found = rater_drift(votes)
    panel = next(t for t in found.tests if (t.kind, t.annotator) == ("position", PANEL))
    assert panel.alarm
    assert panel.now > 0.6
    before = rater_drift(votes, month=MONTHS[-2])
    assert not before.alarm
    assert before.month == MONTHS[-2]
    assert max(cell.month for cell in before.cells) == MONTHS[-2]


@given(st.integers(0, 2**32 - 1))
def test_neither_order_nor_the_names_of_sides_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    votes = months(1, pairs=12, annotators=2, careless=0.5)
    turned = {f"pair {i}" for i in np.flatnonzero(rng.random(12) < 0.5)}
    renamed = [replace(v, swapped=v.swapped != (v.pair in turned)) for v in votes]
    shuffled = [renamed[i] for i in rng.permutation(len(votes))]
    assert rater_drift(shuffled) == rater_drift(votes)


def test_a_report_is_read_back_as_it_was() -> None:
    found = rater_drift(months(0), checks=12)
    assert RaterDrift.from_json(json.loads(json.dumps(found.to_json()))) == found
    for test in found.tests:
        assert test.alarm == (test.adjusted <= 0.05 / 12)


def test_refusals() -> None:
    with pytest.raises(DataError, match="2025-12"):
        rater_drift(months(0, pairs=2), month="2025-12")
    with pytest.raises(DataError):
        rater_drift([])
    with pytest.raises(OptionError):
        rater_drift(months(0, pairs=2), alpha=0.0)
    with pytest.raises(DataError, match=r"0\.7"):
        AnchorVote("p", "a", "2026-01", 0.7)
    with pytest.raises(DataError, match="month"):
        AnchorVote("p", "a", "March", 1.0)
    with pytest.raises(DataError, match="annotator"):
        AnchorVote("p", "", "2026-01", 1.0)


def test_judgments_become_votes_whichever_side_stood_first() -> None:
    when = datetime(2026, 3, 31, 23, tzinfo=UTC)
    shown = Judgment("p", "good", "bad", "first", "ada", when, "test")
    turned = replace(shown, first="bad", second="good", outcome="second", external_id="")
    tie = replace(shown, outcome="tie", external_id="")
    one, two, three = anchor_votes([shown, turned, tie])
    assert one.pair == two.pair == three.pair
    assert one.verdict == two.verdict != three.verdict == 0.5
    assert (one.outcome, two.outcome, one.swapped) == (1.0, 0.0, not two.swapped)
    assert (one.annotator, one.month) == ("ada", "2026-03")
