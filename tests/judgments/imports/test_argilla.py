"""Argilla's records, nested as `records.to_json` writes them and flattened as `to_list` does."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm.errors import BadRowsError, OptionError
from ensemble_rm.judgments.imports.formats import ImportOptions
from ensemble_rm.judgments.imports.importing import import_judgments
from ensemble_rm.judgments.store import JudgmentStore
from tests.support.judgment_rows import NEW_YEAR, write

GIVEN = "2026-03-09T22:16:08.728353Z"
ARGILLA = ImportOptions(source="workspace/pairs", judged_at=NEW_YEAR)


@pytest.fixture
def store(store_place: str) -> JudgmentStore:
    return JudgmentStore.create(store_place)


def record(i: int, said: list[tuple[Any, str]], **changes: Any) -> dict[str, Any]:
    responses = [{"value": value, "user_id": user} for value, user in said]
    whole = {
        "id": f"record-{i}",
        "fields": {"prompt": f"p{i}", "first": f"one {i}", "second": f"two {i}"},
        "metadata": {"policy": "v7", "batch": 3},
        "suggestions": {"preference": {"value": "first", "score": None, "agent": None}},
        "responses": {"preference": responses} if said else {},
        "vectors": {},
        "_server_id": f"0000-{i}",
    }
    return whole | changes


def flat(one: dict[str, Any], status: str = "submitted") -> dict[str, Any]:
    """The record as `to_list(flatten=True)` gives it."""
    row = {"id": one["id"], "_server_id": one["_server_id"], **one["fields"], **one["metadata"]}
    for question, responses in one["responses"].items():
        key = f"{question}.responses"
        row[key] = [response["value"] for response in responses]
        row[f"{key}.users"] = [response["user_id"] for response in responses]
        row[f"{key}.status"] = [status] * len(responses)
    return row


RECORDS = [
    record(1, [("first", "ada"), ("tie", "bob")]),
    record(2, []),
    record(3, [(["second", "first"], "ada")]),
    record(4, [([{"value": "first", "rank": 1}, {"value": "second", "rank": 1}], "ada")]),
    record(5, [([{"value": "first", "rank": 2}, {"value": "second", "rank": 1}], "bob")]),
]


@pytest.mark.parametrize("shape", ["nested", "flattened"])
def test_argillas_records(store: JudgmentStore, tmp_path: Path, shape: str) -> None:
    rows = RECORDS if shape == "nested" else [flat(one) for one in RECORDS]
    path = write(tmp_path / "records.json", rows, array=True)
    found = import_judgments(store, path, format="argilla", options=ARGILLA)
    assert (found.added, found.left_out) == (5, {"unlabelled": 1})
    by_name = {one.external_id: one for one in store.read()}
    assert {name: one.outcome for name, one in by_name.items()} == {
        "record-1:ada": "first",
        "record-1:bob": "tie",
        "record-3:ada": "second",
        "record-4:ada": "tie",
        "record-5:bob": "second",
    }
    one = by_name["record-1:bob"]
    assert (one.annotator, one.policy, one.batch, one.judged_at) == ("bob", "v7", "3", NEW_YEAR)
    other = [flat(one) for one in RECORDS] if shape == "nested" else RECORDS
    later = ImportOptions(source="workspace/pairs", judged_at=datetime(2027, 1, 1, tzinfo=UTC))
    again = import_judgments(store, write(path, other), format="argilla", options=later)
    assert (again.added, again.already) == (0, 5)


def test_argillas_drafts_are_left_out_and_times_are_read(
    store: JudgmentStore, tmp_path: Path
) -> None:
    dated = record(2, [("first", "ada")], metadata={"judged_at": GIVEN})
    rows = [flat(RECORDS[0], "draft"), flat(RECORDS[4], "discarded"), dated]
    path = write(tmp_path / "records.jsonl", rows)
    options = ImportOptions(source="w")
    found = import_judgments(store, path, format="argilla", options=options)
    assert found.left_out == {"a response that is discarded": 1, "a response that is draft": 2}
    assert [one.judged_at for one in store.read()] == [datetime.fromisoformat(GIVEN)]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (record(9, [("third", "ada")]), "unknown verdict 'third'"),
        (record(9, [(["first"], "ada")]), "must contain the two completions"),
        (record(9, [(["first", "first"], "ada")]), "must contain the two completions"),
        (record(9, [("first", "ada")], id=None), "the record's `id`"),
        (record(9, [("first", "ada")], fields={"prompt": "p"}), "needs the field 'first'"),
        (record(9, [], responses={"preference": ["x"]}), "must be an object, not 'x'"),
        (record(9, [], responses={"a": [1], "b": [2]}), r"['a', 'b']; choose one with"),
        ({"id": "9", "p.responses": ["first"], "p.responses.users": []}, "not lists of one length"),
    ],
)
def test_bad_responses_are_named(
    store: JudgmentStore, tmp_path: Path, bad: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "records.json", [RECORDS[0], bad], array=True)
    found = import_judgments(store, path, format="argilla", options=ARGILLA, skip_bad=True)
    (problem,) = found.problems
    assert (found.added, problem.line) == (2, 2) and said in problem.reason


def test_argilla_without_a_time_is_refused(store: JudgmentStore, tmp_path: Path) -> None:
    path = write(tmp_path / "records.json", RECORDS[:1], array=True)
    with pytest.raises(BadRowsError, match="Argilla exports no times"):
        import_judgments(store, path, format="argilla", options=ImportOptions(source="w"))


def test_an_export_needs_the_name_of_its_source(store: JudgmentStore, tmp_path: Path) -> None:
    path = write(tmp_path / "records.json", RECORDS, array=True)
    with pytest.raises(OptionError, match="does not name its source"):
        import_judgments(store, path, format="argilla", options=ImportOptions(judged_at=NEW_YEAR))
