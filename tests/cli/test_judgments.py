"""The command: import, export and report, in words and in JSON, with codes for what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm.cli.main import main
from ensemble_rm.errors import StorageError
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from tests.support.judgment_rows import judged, many, raters, write
from tests.support.tampering import make_old_store, tamper


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    code = main(["judgments", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [one.to_json() for one in many(30)])


def test_import_export_and_back(
    store_place: str, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = told(capsys, "import", store_place, rows_file)
    assert (code, said["added"], said["already"], said["judgments"]) == (0, 30, 0, 30)
    code, said = told(capsys, "import", store_place, rows_file)
    assert (code, said["added"], said["already"], said["judgments"]) == (0, 0, 30, 30)
    out = tmp_path / "out" / "again.jsonl"
    code, said = told(capsys, "export", store_place, "--out", out, "--annotator", "annotator 1")
    assert (code, said["judgments"]) == (0, 10)
    again = [Judgment.from_json(json.loads(line)) for line in out.read_text().splitlines()]
    assert again == [one for one in many(30) if one.annotator == "annotator 1"]


def test_a_window_is_read_in_utc(
    tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "store.db"
    told(capsys, "import", place, rows_file)
    assert main(["judgments", "export", str(place), "--since", "2026-01-02", "--batch", "x"]) == 0
    assert capsys.readouterr().out == ""
    window = ["--since", "2026-01-01T22:00+02:00", "--until", "2026-01-02"]
    assert main(["judgments", "export", str(place), *window]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [judged(i).id for i in range(20, 24)]


def test_a_dry_run_writes_nothing(
    tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "none" / "store.db"
    code, said = told(capsys, "import", place, rows_file, "--dry-run")
    assert (code, said["added"], said["dry_run"]) == (0, 30, True)
    assert not place.parent.exists()
    with JudgmentStore.create(place) as store:
        store.add(many(10))
    code, said = told(capsys, "import", place, rows_file, "--dry-run")
    assert (said["added"], said["already"], said["judgments"]) == (20, 10, 10)


def test_bad_rows_refuse_the_file_or_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "store.db"
    path = write(tmp_path / "bad.jsonl", [judged(0).to_json(), {"prompt": 3}, judged(1).to_json()])
    code, said = told(capsys, "import", place, path)
    assert (code, said["error"]) == (3, "BadRowsError")
    assert f"{path}:2: needs `first`" in said["message"]
    code, said = told(capsys, "import", place, path, "--skip-bad")
    assert (code, said["added"]) == (0, 2)
    assert [bad["line"] for bad in said["bad_rows"]] == [2]
    main(["judgments", "import", str(place), str(path), "--skip-bad"])
    heard = capsys.readouterr()
    assert "0 added (0 corrections), 2 there already, 1 bad" in heard.out
    assert f"bad row: {path}:2: needs `first`" in heard.err


def test_rows_without_a_source_name_the_option_that_sets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = judged(0).to_json()
    del row["id"], row["source"]
    place, path = tmp_path / "store.db", write(tmp_path / "rows.jsonl", [row])
    code, said = told(capsys, "import", place, path)
    assert code == 3 and f"{path}:1: needs `source`; set it for all rows" in said["message"]
    code, said = told(capsys, "import", place, path, "--source", "pilot")
    assert (code, said["added"]) == (0, 1)


def test_the_exports_of_tools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"q": "p", "a": "one", "b": "two"}
    said = {"id": "r", "fields": fields, "responses": {"better": [{"value": "A!", "user_id": "u"}]}}
    path = write(tmp_path / "records.json", [said], array=True)
    place = tmp_path / "store.db"
    words = ["--format", "argilla", "--source", "w", "--question", "better", "--judged-at"]
    words += ["2026-05-01", "--prompt", "q", "--first", "a", "--second", "b", "--label", "A!=first"]
    code, found = told(capsys, "import", place, path, *words)
    assert (code, found["added"]) == (0, 1)
    with JudgmentStore.open(place) as store:
        (one,) = store.read()
    assert (one.outcome, one.first, one.source, one.annotator) == ("first", "one", "w", "u")


def test_a_data_set_on_disk(
    tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    place, out = tmp_path / "store.db", tmp_path / "set"
    told(capsys, "import", place, rows_file)
    code, said = told(capsys, "export", place, "--as", "dataset", "--out", out)
    assert (code, said["judgments"]) == (0, 30)
    found = datasets.load_from_disk(str(out))
    assert [Judgment.from_json(row) for row in found] == many(30)


def test_the_report_in_words_and_in_json(
    store_place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with JudgmentStore.create(store_place) as store:
        store.add(raters(60, k=3, seed=0, agree=0.8, tie=0.1))
    code, said = told(capsys, "report", store_place)
    assert (code, said["judgments"], len(said["raters"]), len(said["couples"])) == (0, 180, 3, 3)
    assert main(["judgments", "report", store_place]) == 0
    shown = capsys.readouterr().out
    assert "180 judgments of 60 pairs (30 prompts) by 3 annotators; 60 pairs have several" in shown
    estimate = said["fleiss_kappa"]["estimate"]
    assert f"Fleiss' kappa                {estimate:.3f} [" in shown
    assert "annotator 0 – annotator 2" in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["report", "none.db"], 4, "no judgment store at"),
        (["export", "none.db"], 4, "no judgment store at"),
        (["import", "s.db", "none.jsonl"], 3, "no such file"),
        (["import", "mysql://h/d", "rows.jsonl"], 2, "postgresql:// URL"),
        (["import", "s.db", "rows.jsonl", "--label", "x"], 2, "needs LABEL=OUTCOME, not 'x'"),
        (["import", "s.db", "rows.jsonl", "--label", "x=left"], 2, "'x' must map to first, second"),
        (["import", "s.db", "rows.jsonl", "--judged-at", "soon"], 2, "--judged-at: "),
        (["import", "s.db", "rows.jsonl", "--format", "argilla"], 2, "does not name its source"),
        (["report", "s.db", "--since", "2026-02-02", "--until", "2026-01-01"], 2, "is empty"),
        (["export", "s.db", "--as", "dataset"], 2, "needs --out"),
    ],
)
def test_what_goes_wrong_has_its_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with JudgmentStore.create("s.db") as store:
        store.add(many(1))
    record = {"id": "r", "fields": {}, "responses": {"p": [{"value": "first", "user_id": "u"}]}}
    write(tmp_path / "rows.jsonl", [record])
    assert main(["judgments", *words]) == code
    assert said in capsys.readouterr().err


def test_a_backup_is_the_store_while_it_is_written_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = tmp_path / "store.db", tmp_path / "backups" / "copy.db"
    with JudgmentStore.create(place) as store:
        store.add(many(30))
        digest = store.digest()
        with store.writer():  # another process is in the middle of an import
            code, said = told(capsys, "backup", place, out)
    assert (code, said["judgments"], said["digest"]) == (0, 30, digest)
    assert [path.name for path in out.parent.iterdir()] == ["copy.db"]  # one file, no log
    with JudgmentStore.open(out, read_only=True) as copy:
        assert list(copy.read()) == many(30)
    code, said = told(capsys, "backup", place, out)
    assert (code, said["error"]) == (2, "OptionError")


def test_a_backup_has_what_a_copy_of_the_file_loses(tmp_path: Path) -> None:
    """With a reader open, new judgments stay in the log, which a copied file does not have."""
    place, copied, backed = (tmp_path / name for name in ("store.db", "copied.db", "backed.db"))
    with JudgmentStore.create(place) as store:
        store.add(many(100))
        reader = store.read()
        next(reader)
        with JudgmentStore.open(place) as writer:
            writer.add(many(1000, start=100))
        shutil.copyfile(place, copied)
        assert main(["judgments", "backup", str(place), str(backed)]) == 0
        reader.close()
        with JudgmentStore.open(backed, read_only=True) as backup:
            assert backup.count() == 1100 and backup.digest() == store.digest()
            assert backup.chain() == store.chain()
    with JudgmentStore.open(copied) as copy:
        assert copy.count() < 1100  # what is guarded against


def test_a_changed_store_is_not_backed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = tmp_path / "store.db", tmp_path / "copy.db"
    with JudgmentStore.create(place) as store:
        store.add(many(20))
    tamper(str(place), "UPDATE judgments SET outcome = 'tie'")
    code, said = told(capsys, "backup", place, out)
    assert (code, said["error"]) == (15, "StoreIntegrityError")
    assert list(tmp_path.glob("copy*")) == []


def test_a_store_of_the_first_release_is_backed_up_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = tmp_path / "store.db", tmp_path / "copy.db"
    make_old_store(str(place), many(20), tmp_path, monkeypatch)
    code, said = told(capsys, "backup", place, out)
    assert (code, said["judgments"]) == (0, 20)
    for path in (place, out):
        with pytest.raises(StorageError, match="schema 0001"):
            JudgmentStore.open(path, read_only=True)


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [("none.db", 4, "no judgment store at"), ("postgresql://u@h/d", 2, "pg_dump")],
)
def test_what_cannot_be_backed_up_is_named(
    place: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["judgments", "backup", place, "copy.db"]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "copy.db").exists()
