"""Agreement against slow formulas, scikit-learn and a published example; bias where it is."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from sklearn.metrics import cohen_kappa_score

from ensemble_rm.errors import DataError
from ensemble_rm.judgments.agreement import AgreementReport, agreement_report
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.kappa import figure, item_agreement, jackknife, kappa, share
from ensemble_rm.judgments.store import JudgmentStore
from tests.support.judgment_rows import NEW_YEAR, judged, many, raters

TURNED = {"first": "second", "second": "first", "tie": "tie"}


@pytest.fixture
def store(store_place: str) -> JudgmentStore:
    return JudgmentStore.create(store_place)


def report_of(rows: list[Judgment], folder: Path) -> AgreementReport:
    with JudgmentStore.create(folder / f"{len(list(folder.iterdir()))}.db") as store:
        store.add(rows)
        return agreement_report(store)


# Oracles ----------------------------------------------------------------------------------------


def fleiss(table: list[list[int]]) -> float:
    """Fleiss 1971, written out; items may have different numbers of annotators."""
    agreements, shares = [], []
    for row in table:
        n = sum(row)
        same = sum(math.comb(count, 2) for count in row)
        agreements.append(same / math.comb(n, 2))
        shares.append([count / n for count in row])
    observed = sum(agreements) / len(table)
    chance = sum((sum(column) / len(table)) ** 2 for column in zip(*shares, strict=True))
    return (observed - chance) / (1 - chance)


# Fourteen annotators, ten items, five categories: the worked example of Fleiss' kappa, .210.
PUBLISHED = [
    *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
    *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
]


def test_the_oracle_gives_the_published_figure() -> None:
    assert fleiss(PUBLISHED) == pytest.approx(0.210, abs=5e-4)
    mean = np.mean([item_agreement(np.array(row, dtype=float)) for row in PUBLISHED])
    assert mean == pytest.approx(0.378, abs=5e-4)


def seen(one: Judgment) -> str:
    """The verdict in an order of the pair's own: that of the texts."""
    return one.outcome if one.first < one.second else TURNED[one.outcome]


def last_verdicts(rows: list[Judgment]) -> dict[bytes, dict[str, str]]:
    found: dict[bytes, dict[str, str]] = defaultdict(dict)
    for one in sorted(rows, key=lambda one: (one.judged_at, one.id)):
        found[one.pair_digest][one.annotator] = seen(one)
    return found


def sample(n: int = 120, **fields: Any) -> list[Judgment]:
    """Judgments with holes: each annotator left a third of the pairs out."""
    given: dict[str, Any] = {"k": 4, "seed": 3, "agree": 0.6, "tie": 0.2}
    rows = raters(n, **{**given, **fields})
    return [one for one in rows if int(one.id, 16) % 3]


def test_fleiss_kappa_is_the_slow_one_over_both_orientations(store: JudgmentStore) -> None:
    rows = sample()
    store.add(rows)
    table = []
    for verdicts in last_verdicts(rows).values():
        if len(verdicts) > 1:
            said = list(verdicts.values())
            one = [said.count("first"), said.count("second"), said.count("tie")]
            table += [one, [one[1], one[0], one[2]]]
    found = agreement_report(store)
    assert found.fleiss_kappa.estimate == pytest.approx(fleiss(table), abs=1e-12)
    assert found.shared == len(table) / 2
    observed = [item_agreement(np.array(row, dtype=float)) for row in table]
    assert found.agreement.estimate == pytest.approx(np.mean(observed), abs=1e-12)


def test_couples_are_cohens_kappa_over_both_orientations(store: JudgmentStore) -> None:
    rows = sample()
    store.add(rows)
    found = {couple.annotators: couple for couple in agreement_report(store).couples}
    verdicts = last_verdicts(rows).values()
    for names in combinations(sorted({one.annotator for one in rows}), 2):
        both = [[said[name] for name in names] for said in verdicts if set(names) <= set(said)]
        one, other = zip(*both, strict=True)
        turned = [[TURNED[word] for word in words] for words in (one, other)]
        oracle = cohen_kappa_score([*one, *turned[0]], [*other, *turned[1]])
        assert found[names].kappa == pytest.approx(oracle, abs=1e-12)
        assert found[names].shared == len(both)
        assert found[names].agreement == pytest.approx(np.mean([a == b for a, b in both]))


def test_with_two_annotators_the_rest_is_the_other(store: JudgmentStore) -> None:
    store.add(sample(k=2))
    found = agreement_report(store)
    (couple,) = found.couples
    for rater in found.raters:
        assert rater.agreement.estimate == pytest.approx(couple.agreement)
        assert rater.kappa.estimate == pytest.approx(couple.kappa)
        assert rater.shared == couple.shared == found.shared


# Laws -------------------------------------------------------------------------------------------


def test_showing_pairs_the_other_way_round_changes_no_agreement(tmp_path: Path) -> None:
    rows = sample()
    turned = [
        judged(
            prompt=one.prompt, first=one.second, second=one.first, outcome=TURNED[one.outcome],
            annotator=one.annotator, judged_at=one.judged_at,
        )
        for one in rows
    ]  # fmt: skip
    plain, other = report_of(rows, tmp_path), report_of(turned, tmp_path)
    assert plain.fleiss_kappa == other.fleiss_kappa
    assert plain.couples == other.couples
    assert plain.ties == other.ties
    assert plain.first_side.estimate == pytest.approx(1 - other.first_side.estimate)
    assert plain.first_side_swapped.estimate == pytest.approx(1 - other.first_side_swapped.estimate)


def test_the_order_of_adding_and_names_of_annotators_change_nothing(tmp_path: Path) -> None:
    rows = sample()
    names = {f"annotator {i}": f"person {9 - i}" for i in range(4)}
    other = [
        judged(
            prompt=one.prompt, first=one.first, second=one.second, outcome=one.outcome,
            annotator=names[one.annotator], judged_at=one.judged_at,
        )
        for one in reversed(rows)
    ]  # fmt: skip
    plain, renamed = report_of(rows, tmp_path), report_of(other, tmp_path)
    assert plain.fleiss_kappa.estimate == pytest.approx(renamed.fleiss_kappa.estimate)
    for one, two in zip(plain.raters, reversed(renamed.raters), strict=True):
        assert names[one.annotator] == two.annotator
        assert one.kappa.estimate == pytest.approx(two.kappa.estimate)


def test_who_always_agrees_has_kappa_one_and_coins_none(tmp_path: Path) -> None:
    sure = report_of(list(raters(200, k=3, seed=0, agree=1.0, tie=0.0)), tmp_path)
    assert sure.fleiss_kappa.estimate == pytest.approx(1)
    assert sure.agreement.estimate == 1 and sure.agreement.low < 1
    coins = report_of(list(raters(600, k=3, seed=0, agree=0.0, tie=0.0)), tmp_path)
    assert coins.fleiss_kappa.low < 0 < coins.fleiss_kappa.high
    assert coins.agreement.low < 0.5 < coins.agreement.high


def test_a_bias_for_a_side_is_found_and_none_where_there_is_none(tmp_path: Path) -> None:
    biased = list(raters(600, k=3, seed=4, agree=0.4, tie=0.1, first=0.8))
    found = report_of(biased, tmp_path)
    # Of no ties, .4 follow the truth (half of them first) and .6 take the first side at .8.
    expected = 0.4 * 0.5 + 0.6 * 0.8
    reach = found.first_side.high - found.first_side.low  # four standard errors
    assert abs(found.first_side.estimate - expected) < reach
    assert found.first_side.low > 0.5
    assert found.first_side_swapped.low > 0.5
    assert found.ties.low < 0.1 < found.ties.high
    fair = report_of(list(raters(600, k=3, seed=2, agree=0.4, tie=0.1)), tmp_path)
    assert fair.first_side.low < 0.5 < fair.first_side.high
    assert fair.first_side_swapped.low < 0.5 < fair.first_side_swapped.high


def test_pairs_in_both_orders_tell_bias_from_better_first_sides(tmp_path: Path) -> None:
    """The better one shown first four times of five: no bias, though the first side wins."""
    rows = []
    for i in range(400):
        for who in range(5):
            better, worse = f"better {i}", f"worse {i}"
            sides = (worse, better) if who == i % 5 else (better, worse)
            rows.append(
                judged(
                    prompt=f"p{i}", first=sides[0], second=sides[1],
                    outcome="first" if sides[0] == better else "second",
                    annotator=f"annotator {who}", judged_at=NEW_YEAR + timedelta(minutes=i),
                )
            )  # fmt: skip
    found = report_of(rows, tmp_path)
    assert found.first_side.low > 0.75
    assert found.first_side_swapped.estimate == 0.5
    assert found.swapped == 400


def test_a_repeat_counts_once_and_says_how_steady_one_is(store: JudgmentStore) -> None:
    rows = [judged(i, prompt="p", first="a", second="b", annotator="ada") for i in range(5)]
    rows = [
        judged(i, prompt="p", first="a", second="b", annotator="ada", outcome=outcome)
        for i, outcome in enumerate(("first", "first", "tie", "second"))
    ]
    rows.append(judged(9, prompt="p", first="b", second="a", annotator="bob", outcome="first"))
    store.add(rows)
    found = agreement_report(store)
    ada, bob = found.raters
    assert (ada.judgments, ada.repeats, ada.self_agreement) == (4, 3, 1 / 3)
    assert bob.repeats == 0 and math.isnan(bob.self_agreement)
    assert (found.shared, found.agreement.estimate) == (1, 1.0)  # ada's last: b, as bob says


def test_equal_texts_count_in_nothing_else(store: JudgmentStore) -> None:
    store.add([*many(6), judged(50, first="same", second="same")])
    found = agreement_report(store)
    assert (found.judgments, found.equal_sides, found.pairs) == (7, 1, 3)
    assert sum(rater.judgments for rater in found.raters) == 6


def test_corrections_and_selections_are_heeded(store: JudgmentStore) -> None:
    rows = sample()
    store.add(rows)
    old = rows[0]
    store.add([old.corrected("tie", judged_at=NEW_YEAR + timedelta(days=900))])
    assert agreement_report(store).judgments == len(rows)
    one = agreement_report(store, JudgmentFilter(annotator="annotator 1"))
    assert [rater.annotator for rater in one.raters] == ["annotator 1"]
    assert one.shared == 0 and math.isnan(one.fleiss_kappa.estimate)
    with pytest.raises(DataError, match="contains no selected judgment"):
        agreement_report(store, JudgmentFilter(annotator="nobody"))


def test_the_report_is_json_without_nan(store: JudgmentStore) -> None:
    store.add(many(1))
    said = json.loads(json.dumps(agreement_report(store).to_json(), allow_nan=False))
    assert said["fleiss_kappa"] == {"estimate": None, "low": None, "high": None}
    assert said["raters"][0]["annotator"] == "annotator 0"


# Intervals --------------------------------------------------------------------------------------


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30), st.integers(0, 5))
def test_the_jackknife_of_a_mean_is_its_standard_error(values: list[float], empty: int) -> None:
    """With an observation a group; groups without any change nothing."""
    sums = np.array([[value, 1.0] for value in values] + [[0.0, 0.0]] * empty)
    estimate, error, n = jackknife(sums, lambda sums: float(sums[0] / sums[1]))
    assert n == len(values)
    assert estimate == pytest.approx(np.mean(values), abs=1e-9)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(n), abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=64))
def test_a_shares_interval_holds_the_share_and_lies_in_the_unit(
    counts: list[tuple[int, int]],
) -> None:
    sums = np.array([[hits, hits + misses] for hits, misses in counts], dtype=float)
    found, turned = share(sums), share(np.stack([sums[:, 1] - sums[:, 0], sums[:, 1]], axis=1))
    if (sums[:, 1] > 0).sum() < 2:
        assert math.isnan(found.low)
        return
    assert 0 <= found.low <= found.estimate + 1e-12
    assert found.estimate - 1e-12 <= found.high <= 1
    assert found.low < found.high
    assert found.low == pytest.approx(1 - turned.high, abs=1e-9)


def test_intervals_cover_as_often_as_they_say_under_clusters() -> None:
    """Prompts with a share of their own: 95 % intervals that ignore them would cover far less."""
    rng = np.random.default_rng(0)
    runs, hit, kappas = 400, 0, 0
    for _ in range(runs):
        truth = rng.beta(2, 2, size=64)
        sums = np.stack([rng.binomial(20, truth), np.full(64, 20)], axis=1).astype(float)
        found = share(sums)
        hit += found.low <= 0.5 <= found.high
        other = figure(sums, lambda sums: kappa(float(sums[0] / sums[1]), 0.0, 0.0))
        kappas += other.low <= 0.0 <= other.high
    assert 0.92 <= hit / runs <= 0.98
    assert 0.92 <= kappas / runs <= 0.98
