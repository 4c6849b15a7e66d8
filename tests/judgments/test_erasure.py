"""Retractions leave no verdict; erasures leave no text, and a chain that can still be checked."""

from __future__ import annotations

import json
import sqlite3
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from ensemble_rm.cli.main import main
from ensemble_rm.errors import BadRowsError, DataError
from ensemble_rm.judgments.agreement import agreement_report
from ensemble_rm.judgments.checking import check_store
from ensemble_rm.judgments.database.engine import Database
from ensemble_rm.judgments.exports import export_judgments, judgment_dataset
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.imports.importing import import_judgments
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import Added, JudgmentStore
from ensemble_rm.judgments.votes import to_preferences
from tests.support.judgment_rows import NEW_YEAR, judged, many, write

LATER = NEW_YEAR + timedelta(days=40)
HISTORY = JudgmentFilter(with_corrected=True)


@pytest.fixture
def store(store_place: str) -> JudgmentStore:
    return JudgmentStore.create(store_place)


# Retractions --------------------------------------------------------------------------------------


def test_a_retraction_takes_a_verdict_away(store: JudgmentStore) -> None:
    rows = many(9)
    back = rows[4].retracted(judged_at=LATER)
    store.add([back, *rows])
    assert back.is_retraction and back.corrects == rows[4].id
    kept = [one for one in rows if one is not rows[4]]
    assert list(store.read()) == kept and store.count() == 8
    assert store.preferences() == to_preferences(kept, source=store.name)
    assert len(list(store.observations())) == len(list(store.verdicts())) == 8
    assert store.newest() == rows[-1].judged_at
    assert agreement_report(store).judgments == 8
    assert store.digest() != store.digest(HISTORY)


def test_the_history_keeps_a_retraction_without_a_verdict(
    store: JudgmentStore, tmp_path: Path
) -> None:
    rows = many(3)
    store.add([*rows, rows[1].retracted(judged_at=LATER)])
    history = list(store.read(HISTORY))
    assert len(history) == store.count(HISTORY) == 4
    assert len(list(store.observations(HISTORY))) == len(list(store.verdicts(HISTORY))) == 3
    assert sum(pair.weight for pair in to_preferences(history)) == 3
    assert len(judgment_dataset(store, HISTORY)) == 4
    path = write(tmp_path / "all.jsonl", list(export_judgments(store, HISTORY)))
    other = JudgmentStore.create(tmp_path / "other.db")
    assert import_judgments(other, path).added == 4
    assert other.digest() == store.digest() and other.digest(HISTORY) == store.digest(HISTORY)


def test_a_retraction_can_be_corrected_and_not_repeated(store: JudgmentStore) -> None:
    old = judged(0)
    back = old.retracted(judged_at=LATER)
    again = back.corrected("tie", judged_at=LATER + timedelta(days=1))
    store.add([old, back])
    with pytest.raises(DataError, match="already has a correction"):
        store.add([old.retracted(judged_at=LATER + timedelta(days=2))])
    store.add([again])
    assert [one.outcome for one in store.read()] == ["tie"]


def test_a_retraction_takes_back_a_judgment_of_its_annotator() -> None:
    with pytest.raises(DataError, match="`outcome` retracted needs `corrects`"):
        judged(0, outcome="retracted")
    with pytest.raises(DataError, match="by annotator 'x', the judgment by 'annotator 0'"):
        judged(0).retracted(judged_at=LATER, annotator="x")


def test_the_command_retracts(store_place: str, capsys: pytest.CaptureFixture[str]) -> None:
    JudgmentStore.create(store_place).add(many(5))
    words = ["judgments", "retract", store_place, judged(1).id, judged(2).id]
    assert main([*words, "--at", "2026-03-01", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"retracted": 2, "judgments": 3}
    assert main([*words, "--at", "2026-03-01"]) == 0  # again: nothing changes
    assert main(["judgments", "retract", store_place, "0" * 32]) == 3
    assert f"has no judgment {'0' * 32}" in capsys.readouterr().err
    with JudgmentStore.open(store_place) as store:
        assert list(store.read()) == [judged(0), judged(3), judged(4)]


# Erasures -----------------------------------------------------------------------------------------


def bodies(store_place: str) -> str:
    """All texts in the store, by another way than its own."""
    engine = Database(store_place, create=False, read_only=True).engine
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT body FROM judgment_texts")
        return "".join(body for (body,) in rows)


def test_erased_texts_are_gone_and_the_chain_still_fits(
    store: JudgmentStore, store_place: str
) -> None:
    store.add(many(18))
    head = store.chain().head
    rows, texts = store.erase([judged(0).id])
    # Two pairs of one prompt, three judgments each: all of them read the erased prompt.
    assert [row.id for row in rows if row.asked] == [judged(0).id]
    assert {row.id for row in rows} == {judged(i).id for i in range(6)} and texts == 3
    left = bodies(store_place)
    assert "prompt 0" not in left and "good answer 0" not in left and "good answer 2" in left
    for where in (JudgmentFilter(), HISTORY):
        assert list(store.read(where)) == many(12, start=6) and store.count(where) == 12
        assert len(list(store.observations(where))) == len(list(store.verdicts(where))) == 12
    checked = check_store(store_place)
    assert (checked.judgments, checked.erased) == (18, 6)
    assert store.chain().has_head(head) and store.chain().links[-1].erasures == 6
    assert store.erase([judged(0).id]) == (rows, 0)  # again: nothing to do
    assert store.chain().links[-1].erasures == 6


def test_shared_texts_may_be_kept(store: JudgmentStore, store_place: str) -> None:
    alone = judged(0, prompt="mine alone", annotator="z")
    store.add([*many(6), alone])
    rows, texts = store.erase([alone.id], keep_shared=True)
    assert [row.id for row in rows] == [alone.id] and texts == 1  # its answers are others' too
    assert list(store.read()) == many(6)
    assert "mine alone" not in bodies(store_place) and "good answer 0" in bodies(store_place)
    assert check_store(store_place).erased == 1


def test_a_dry_run_erases_nothing(store: JudgmentStore) -> None:
    store.add(many(6))
    head = store.chain().head
    rows, texts = store.erase([judged(0).id], dry_run=True)
    assert (len(rows), texts) == (6, 3)
    assert list(store.read()) == many(6) and store.chain().head == head
    with pytest.raises(DataError, match=f"has no judgment {'0' * 32}"):
        store.erase(["0" * 32, judged(0).id])
    assert list(store.read()) == many(6)


def test_an_erased_text_does_not_come_back(store: JudgmentStore, tmp_path: Path) -> None:
    store.add(many(6))
    store.erase([judged(0).id])
    assert store.add(many(6)) == Added(0, 6)
    new = judged(0, annotator="new")
    with pytest.raises(DataError, match="was erased from the store"):
        store.add([new])
    path = write(tmp_path / "rows.jsonl", [one.to_json() for one in (*many(8), new)])
    with pytest.raises(BadRowsError, match=r"1 of 9 verdicts .*nothing was written"):
        import_judgments(store, path)
    found = import_judgments(store, path, skip_bad=True)
    assert (found.added, found.already, len(found.problems)) == (2, 6, 1)
    assert list(store.read()) == many(2, start=6)


def test_nothing_of_an_erased_text_is_left_in_the_file(tmp_path: Path) -> None:
    """Not in free pages, and not in the log: texts of several pages each, split and moved."""
    place = tmp_path / "store.db"
    store = JudgmentStore.create(place)
    secrets = [judged(7 * i, first=f"secret {i} " * 900) for i in range(20)]
    for one in secrets:
        store.add([one, *many(3, start=1000 + 9 * secrets.index(one))])
    everything = b"".join(path.read_bytes() for path in tmp_path.glob("store.db*"))
    assert b"secret" in everything
    keeper = sqlite3.connect(place)  # with another connection, closing does not empty the log
    keeper.execute("SELECT count(*) FROM judgments").fetchall()
    store.erase([one.id for one in secrets])
    everything = b"".join(path.read_bytes() for path in tmp_path.glob("store.db*"))
    assert b"secret" not in everything and b"good answer 333" in everything
    keeper.close()
    assert check_store(place).erased == 20


def test_only_the_texts_of_erased_judgments_can_be_emptied(
    store: JudgmentStore, store_place: str
) -> None:
    """The database's trigger lets an erasure through, and no other change."""
    store.add(many(12))
    store.erase([judged(0).id])
    engine = Database(store_place, create=False, read_only=False).engine
    for change in (
        "UPDATE judgment_texts SET body = ''",
        "UPDATE judgment_texts SET body = '\"back\"' WHERE body = ''",
        "DELETE FROM judgment_erasures",
        "UPDATE judgment_chain SET erasures = 0",
    ):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.exec_driver_sql(change)


def test_a_corrected_judgment_can_be_erased(store: JudgmentStore) -> None:
    old = judged(0)
    new: Judgment = old.corrected("tie", judged_at=LATER)
    store.add([old, new, judged(9)])
    rows, _ = store.erase([new.id])
    assert {row.id for row in rows} == {old.id, new.id}
    assert list(store.read()) == [judged(9)]
