"""Files into the store and out again: bad rows named, good ones kept, repeats harmless."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm.errors import BadRowsError, DataError, OptionError
from ensemble_rm.judgments.exports import export_judgments, judgment_dataset
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.imports.formats import Imported, ImportOptions
from ensemble_rm.judgments.imports.importing import import_judgments
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from tests.support.judgment_rows import CHAT, NEW_YEAR, judged, many, write


@pytest.fixture
def store(store_place: str) -> JudgmentStore:
    return JudgmentStore.create(store_place)


# Our own JSONL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
def test_what_is_exported_is_imported_whole(
    store: JudgmentStore, tmp_path: Path, *, zipped: bool
) -> None:
    rows = many(40)
    late = rows[3].corrected("tie", judged_at=rows[3].judged_at)  # the same time, so by id
    store.add([*rows, late])
    everything = JudgmentFilter(with_corrected=True)
    path = write(tmp_path / "all.jsonl", list(export_judgments(store, everything)))
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    other = JudgmentStore.create(tmp_path / "other.db")
    assert import_judgments(other, path) == Imported(verdicts=41, added=41)
    assert other.digest(everything) == store.digest(everything)
    assert import_judgments(other, path) == Imported(verdicts=41, already=41)


def test_rows_may_lack_what_the_options_say(store: JudgmentStore, tmp_path: Path) -> None:
    rows = [one.to_json() for one in many(3)]
    for row in rows:
        del row["id"], row["source"], row["external_id"]
    rows[0]["judged_at"] = "2026-01-01T00:00:00"
    options = ImportOptions(source="test", assume_utc=True)
    import_judgments(store, write(tmp_path / "rows.jsonl", rows), options=options)
    assert list(store.read()) == many(3)


TAKEN = judged(1, external_id="taken")
RIVAL = judged(0).corrected("second", judged_at=judged(300).judged_at)
BAD = [
    ('{"prompt": "p", "first": ', "not JSON"),
    ("[1, 2]", "a row must be an object, not list"),
    (judged(11).to_json() | {"outcome": "left"}, "must be first, second or tie, not 'left'"),
    (judged(12).to_json() | {"judged_at": "2026-01-01T00:00:00"}, "no time zone"),
    (judged(13).to_json() | {"outcome": "first", "annotator": "x"}, "does not match this row"),
    ({"prompt": "p"}, "needs `first`"),
    (judged(14, external_id="taken").to_json(), "'taken' of source 'test' is stored with other"),
    (judged(15, external_id="twice").to_json(), "'twice' of source 'test' is stored with other"),
    (judged(16, corrects="0" * 32).to_json(), "no such judgment is stored"),
    (RIVAL.to_json(), "already has a correction"),
    (judged(19, corrects=TAKEN.id).to_json(), "the correction has another prompt"),
    (judged(2, corrects=judged(102).id, external_id="x").to_json(), "by annotator 'annotator 2'"),
    (judged(0, corrects=judged(103).id).to_json(), "by annotator 'annotator 0', the judgment by"),
]


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    """Good rows on even lines, each kind of bad one on the odd ones after the third."""
    good = [judged(i) for i in range(100, 100 + len(BAD))]
    good[0] = judged(100, external_id="twice")
    good[1] = judged(0).corrected("tie", judged_at=judged(200).judged_at)
    lines = []
    for one, (bad, _) in zip(good, BAD, strict=True):
        lines += [json.dumps(one.to_json()), bad if isinstance(bad, str) else json.dumps(bad)]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def check_problems(problems: Any, path: Path) -> None:
    assert [problem.line for problem in problems] == [2 * i + 2 for i in range(len(BAD))]
    for problem, (_, said) in zip(problems, BAD, strict=True):
        assert problem.source == str(path)
        assert said in problem.reason


def test_a_file_with_bad_rows_is_refused_whole(store: JudgmentStore, bad_file: Path) -> None:
    store.add([judged(0), TAKEN])
    digest = store.digest()
    with pytest.raises(BadRowsError, match=r"13 of 26 verdicts .* nothing was written") as caught:
        import_judgments(store, bad_file)
    check_problems(caught.value.problems, bad_file)
    assert store.digest() == digest


def test_bad_rows_can_be_skipped_and_are_still_named(store: JudgmentStore, bad_file: Path) -> None:
    store.add([judged(0), TAKEN])
    found = import_judgments(store, bad_file, skip_bad=True)
    check_problems(found.problems, bad_file)
    assert (found.verdicts, found.added, found.already) == (26, 13, 0)
    assert store.count(JudgmentFilter(with_corrected=True)) == 15


@pytest.mark.parametrize("change", [{"batch": "b"}, {"inclusion": 0.5}, {"outcome": "tie"}])
def test_a_row_that_changed_is_no_repeat(
    store: JudgmentStore, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Whatever it is that changed, and whether or not corrections are wanted."""
    store.add([judged(0, external_id="7")])
    path = write(tmp_path / "rows.jsonl", [judged(0, external_id="7", **change).to_json()])
    for correct in (False, True):
        with pytest.raises(BadRowsError, match="is stored with other content"):
            import_judgments(store, path, correct=correct)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batches_change_nothing(
    store: JudgmentStore, bad_file: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("ensemble_rm.judgments.imports.importing.BATCH", size)
    store.add([judged(0), TAKEN])
    with pytest.raises(BadRowsError) as caught:
        import_judgments(store, bad_file)
    check_problems(caught.value.problems, bad_file)
    found = import_judgments(store, bad_file, skip_bad=True)
    check_problems(found.problems, bad_file)
    assert found.added == 13


def test_a_dry_run_counts_as_the_import_does(store: JudgmentStore, bad_file: Path) -> None:
    store.add([judged(0), TAKEN])
    digest = store.digest()
    dry = import_judgments(store, bad_file, skip_bad=True, dry_run=True)
    assert store.digest() == digest
    assert import_judgments(store, bad_file, skip_bad=True) == dry
    assert import_judgments(store, bad_file, skip_bad=True).already == 13


def test_what_cannot_be_read_at_all_is_named(store: JudgmentStore, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        import_judgments(store, tmp_path / "none.jsonl")
    with pytest.raises(OptionError, match=r"'csv'; choose one of jsonl, label-studio"):
        import_judgments(store, tmp_path, format="csv")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(judged().to_json()).encode())[:-9])
    with pytest.raises(DataError, match="cannot be read to its end"):
        import_judgments(store, cut)
    broken = tmp_path / "broken.json"
    broken.write_text("[{}, ")
    with pytest.raises(DataError, match="not valid JSON"):
        import_judgments(store, broken, format="label-studio", options=ImportOptions(source="s"))
    with pytest.raises(OptionError, match="'x' must map to first, second or tie, not 'left'"):
        ImportOptions(labels={"x": "left"})
    assert store.count() == 0


# Data sets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_a_data_set_reads_back(store: JudgmentStore, *, chat: bool) -> None:
    rows = many(12, batch="b", strategy="random", inclusion=0.5)
    rows += [rows[0].corrected("tie", judged_at=NEW_YEAR)]
    if chat:
        rows += many(3, start=30, prompt=CHAT)
    store.add(rows)
    found = judgment_dataset(store)
    assert len(found) == store.count()
    again = [Judgment.from_json({**row, "id": None, "external_id": "x"}) for row in found]
    for one, stored in zip(again, store.read(), strict=True):
        assert one.pair_digest == stored.pair_digest
        assert (one.outcome, one.judged_at, one.batch) == (
            *(stored.outcome, stored.judged_at, stored.batch),
        )
    if not chat:
        assert [Judgment.from_json(row) for row in found] == list(store.read())


def test_an_empty_selection_is_an_empty_data_set(store: JudgmentStore) -> None:
    found = judgment_dataset(store)
    assert len(found) == 0
    assert "judged_at" in found.column_names
