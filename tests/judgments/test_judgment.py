"""Judgments: named by their content, read back equal, refused by name, joined into votes."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, strategies as st

from ensemble_rm.data.samples import Message
from ensemble_rm.errors import DataError, OptionError
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.votes import to_preferences
from tests.support.judgment_rows import CHAT, NEW_YEAR, judged, judgments, many


@given(judgments)
def test_a_row_reads_back(one: Judgment) -> None:
    again = Judgment.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one
    assert again.id == one.id


@given(judgments, st.timezones())
def test_the_same_moment_elsewhere_is_the_same_judgment(one: Judgment, zone: Any) -> None:
    row = one.to_json() | {"judged_at": one.judged_at.astimezone(zone).isoformat()}
    assert Judgment.from_json(row).id == one.id


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "another"},
        {"prompt": CHAT},
        {"first": "another"},
        {"second": "another"},
        {"outcome": "tie"},
        {"annotator": "another"},
        {"judged_at": NEW_YEAR + timedelta(microseconds=1)},
        {"source": "another"},
        {"external_id": "another"},
        {"batch": "another"},
        {"policy": "another"},
        {"subset": "another"},
        {"strategy": "bald", "inclusion": 0.5},
        {"inclusion": 0.25},
        {"corrects": "0" * 32},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_is_part_of_the_name(change: dict[str, Any]) -> None:
    assert judged(**change).id != judged().id
    row = judged(**change).to_json()
    with pytest.raises(DataError, match="does not match this row"):
        Judgment.from_json(row | {"id": judged().id})


def test_a_pair_is_one_whichever_side_stood_first() -> None:
    one = judged(first="a", second="b")
    assert one.pair_digest == judged(first="b", second="a").pair_digest
    assert one.pair_digest != judged(first="a", second="c").pair_digest
    assert one.pair_digest != judged(first="a", second="b", prompt="other").pair_digest
    chat = judged(first="a", second="b", prompt=(Message("user", one.prompt),))
    assert chat.pair_digest == one.pair_digest  # a text and its single user turn
    assert chat.id != one.id


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"outcome": "left"}, "first, second or tie, not 'left'"),
        ({"judged_at": datetime(2026, 1, 1)}, "no time zone"),
        ({"judged_at": "2026-01-01"}, "must be a datetime"),
        ({"judged_at": datetime.min.replace(tzinfo=timezone(timedelta(hours=1)))}, "calendar"),
        ({"annotator": ""}, "`annotator` is empty"),
        ({"annotator": 7}, "`annotator` must be text, not 7"),
        ({"source": "x" * 1001}, "more than 1000 bytes"),
        ({"batch": "a\0b"}, "`batch` has NUL"),
        ({"external_id": "\ud800"}, "not valid Unicode at character 0"),
        ({"first": "\ud800"}, "`first` is not valid Unicode"),
        ({"first": None}, "`first` must be text, not NoneType"),
        ({"prompt": ""}, "`prompt` must be text or messages"),
        ({"prompt": ({"role": "user", "content": "Hi"},)}, "tuple of Message"),
        ({"inclusion": 0.0}, r"must be in \(0, 1\], not 0.0"),
        ({"inclusion": float("nan")}, r"must be in \(0, 1\], not nan"),
        ({"inclusion": True}, r"must be in \(0, 1\], not True"),
        ({"strategy": "bald"}, "'bald' needs `inclusion`"),
        ({"corrects": "ABC"}, "32 hex digits, not 'ABC'"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        judged(**change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"judged_at": "yesterday"}, "ISO 8601"),
        ({"judged_at": "2026-01-01T00:00:00"}, "no time zone"),
        ({"judged_at": 5}, "must be a datetime, not 5"),
        ({"source": None}, "needs `source`"),
        ({"prompt": 3}, "`prompt` must be text or a list"),
        ({"prompt": [{"role": "user"}]}, "needs text under 'content'"),
    ],
)
def test_a_bad_row_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    row = judged().to_json()
    del row["id"]
    with pytest.raises(DataError, match=said):
        Judgment.from_json(row | change)


def test_a_time_without_offset_is_utc_only_when_asked() -> None:
    row = judged().to_json() | {"judged_at": "2026-01-01T00:00:00"}
    assert Judgment.from_json(row, assume_utc=True).judged_at == NEW_YEAR


def test_a_correction_names_the_old_and_has_an_id_of_its_own() -> None:
    old = judged(external_id="7")
    new = old.corrected("second", judged_at=NEW_YEAR + timedelta(days=1), batch="second look")
    assert (new.corrects, new.outcome, new.batch) == (old.id, "second", "second look")
    assert new.external_id != old.external_id
    assert new.pair_digest == old.pair_digest


def test_a_selections_window_must_have_room_and_a_zone() -> None:
    with pytest.raises(OptionError, match="empty"):
        JudgmentFilter(since=NEW_YEAR, until=NEW_YEAR)
    with pytest.raises(OptionError, match=r"since: .*no time zone"):
        JudgmentFilter(since=datetime(2026, 1, 1))
    cet = timezone(timedelta(hours=1))
    assert JudgmentFilter(since=NEW_YEAR.astimezone(cet)).since == NEW_YEAR.astimezone(UTC)
    assert JudgmentFilter(batch="a", subset=("b", "c")).names == {
        "batch": ("a",),
        "subset": ("b", "c"),
    }


# Votes ---------------------------------------------------------------------------------------


def test_votes_do_not_know_which_side_stood_first() -> None:
    """Showing a judgment the other way round, verdict and all, changes no share of votes."""
    rows = many(60)
    turned = {"first": "second", "second": "first", "tie": "tie"}
    other = [
        judged(i, first=one.second, second=one.first, outcome=turned[one.outcome]) if i % 2 else one
        for i, one in enumerate(rows)
    ]
    shares = []
    for found in (to_preferences(rows), to_preferences(other)):
        shares.append({(pair.id, pair.chosen): pair.votes for pair in found})
        shares[-1] |= {(pair.id, pair.rejected): (pair.votes or ())[::-1] for pair in found}
    assert shares[0] == shares[1]


def test_each_judgment_is_one_observation() -> None:
    found = to_preferences(many(61))
    assert sum(pair.weight for pair in found) == 61
    assert len(found) == 21
    assert len(set(found.groups)) == 11


def test_votes_weigh_by_the_probability_of_inclusion() -> None:
    """Horvitz and Thompson: the weights of what was drawn sum to the pool, on average."""
    drawn = [judged(i, inclusion=0.25, strategy="bald") for i in range(12)]
    found = to_preferences([*drawn, *many(12, start=12)])
    assert sum(pair.weight for pair in found) == pytest.approx(12 / 0.25 + 12)


def test_ties_count_half_on_each_side_and_slices_stay_apart() -> None:
    rows = [judged(outcome="tie"), judged(outcome="first", annotator="b", subset="s")]
    plain, sliced = to_preferences(rows)
    assert (plain.votes, plain.subset, plain.target) == ((0.5, 0.5), None, 0.5)
    assert (sliced.votes, sliced.subset, sliced.target) == ((1.0, 0.0), "s", 1.0)


def test_ties_among_votes_are_kept() -> None:
    one = Judgment("p", "a", "b", "tie", "ada", datetime(2026, 3, 1, tzinfo=UTC), "test")
    rows = [
        one,
        replace(one, annotator="ben", outcome="first", external_id=""),
        replace(one, annotator="cy", first="b", second="a", external_id=""),
    ]
    (pair,) = to_preferences(rows)
    assert (pair.votes, pair.tie_votes, pair.tie_share) == ((2.0, 1.0), 2.0, 2 / 3)
