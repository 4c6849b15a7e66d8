"""What is read is checked, whatever the way: no change past the library reaches a reader unseen."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings

from ensemble_rm.cli.main import main
from ensemble_rm.errors import StorageError, StoreIntegrityError
from ensemble_rm.judgments.checking import check_store, repair_store
from ensemble_rm.judgments.database.checking import RowChecker, raw_rows
from ensemble_rm.judgments.database.engine import Database
from ensemble_rm.judgments.database.writing import insert
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from tests.support.judgment_rows import CHAT, NEW_YEAR, judged, judgments, many
from tests.support.tampering import drop_triggers, make_old_store, tamper

ONE_TURN = CHAT[-1:]
OLD, NEW = judged(14), judged(14).corrected("tie", judged_at=NEW_YEAR + timedelta(days=9))
HISTORY = JudgmentFilter(with_corrected=True)
LATE = JudgmentFilter(since=NEW_YEAR + timedelta(hours=8))

WAYS: dict[str, Callable[[JudgmentStore, JudgmentFilter], Any]] = {
    "read": lambda store, where: [one.id for one in store.read(where)],
    "observations": lambda store, where: list(store.observations(where)),
    "verdicts": lambda store, where: list(store.verdicts(where)),
    "verdicts by pair": lambda store, where: list(store.verdicts_by_pair(where)),
    "digest": lambda store, where: store.digest(where),
    "preferences": lambda store, where: list(store.preferences(where)),
    "count": lambda store, where: store.count(where),
    "newest": lambda store, where: store.newest(where),
}


@pytest.fixture
def filled(store_place: str) -> str:
    """Three batches, with a correction, prompts of one message, labels and probabilities."""
    with JudgmentStore.create(store_place) as store:
        store.add(many(12, batch="b", strategy="random", inclusion=0.5))
        store.add([OLD, *many(6, start=20, prompt=ONE_TURN, policy='ü "7"\n')])
        store.add([NEW, judged(60)])
    return store_place


def statement(place: str, text: str) -> str:
    """An hour later, in the database's own words."""
    later = "judged_at + interval '1 hour'"
    if not place.startswith("postgresql"):
        later = "substr(judged_at, 1, 11) || '23' || substr(judged_at, 14)"
    return text.replace("LATER", later)


SOME = (
    "WHERE external_id IN (SELECT external_id FROM judgments ORDER BY judged_at LIMIT 1 OFFSET 10)"
)
ROWS = {
    "outcome": f"UPDATE judgments SET outcome = 'tie' {SOME}",
    "every outcome": "UPDATE judgments SET outcome = CASE outcome WHEN 'first' THEN 'second' "
    "WHEN 'second' THEN 'first' ELSE 'first' END WHERE corrects IS NULL",
    "annotator": f"UPDATE judgments SET annotator = 'someone' {SOME}",
    "time": f"UPDATE judgments SET judged_at = LATER {SOME}",
    "probability": f"UPDATE judgments SET inclusion = 0.25 {SOME}",
    "strategy": f"UPDATE judgments SET strategy = 'bald' {SOME}",
    "batch": f"UPDATE judgments SET batch = NULL {SOME}",
    "source": f"UPDATE judgments SET source = 'elsewhere' {SOME}",
    "pair": f"UPDATE judgments SET pair_key = prompt_key {SOME}",
    "prompt's key": f"UPDATE judgments SET prompt_key = pair_key {SOME}",
    "sides": f"UPDATE judgments SET first = second, second = first {SOME}",
    "correction undone": "UPDATE judgments SET corrects = NULL WHERE corrects IS NOT NULL",
    "corrected by another": "UPDATE judgments SET corrects = (SELECT id FROM judgments "
    "WHERE batch = 'b' ORDER BY judged_at LIMIT 1) WHERE judged_at = (SELECT max(judged_at) "
    "FROM judgments WHERE corrects IS NULL)",
    "batch of the chain": f"UPDATE judgments SET link = 3 {SOME}",
    "deleted": "DELETE FROM judgments WHERE judged_at = (SELECT max(judged_at) FROM judgments "
    "WHERE corrects IS NULL)",
    "correction deleted": "DELETE FROM judgments WHERE corrects IS NOT NULL",
    "last link deleted": "DELETE FROM judgment_chain WHERE number = 3",
    "link changed": "UPDATE judgment_chain SET judgments = 11 WHERE number = 1",
    "arrival changed": "UPDATE judgment_chain SET appended_at = NULL WHERE number = 2",
}  # fmt: skip


@pytest.mark.parametrize("change", ROWS)
def test_no_change_reaches_a_reader_unseen(filled: str, change: str) -> None:
    """Each way of reading returns what it returned before, or refuses; the job's way refuses."""
    wheres = (JudgmentFilter(), HISTORY, LATE)
    with JudgmentStore.open(filled) as store:
        before = {
            (name, i): way(store, w) for name, way in WAYS.items() for i, w in enumerate(wheres)
        }
    tamper(filled, statement(filled, ROWS[change]))
    with JudgmentStore.open(filled) as store:
        for (name, i), value in before.items():
            try:
                after = WAYS[name](store, wheres[i])
            except StoreIntegrityError:
                continue
            assert after == value, (name, i)
        with pytest.raises(StoreIntegrityError):
            list(store.observations())
        with pytest.raises(StoreIntegrityError):
            store.digest()
    for check in (check_store, repair_store):
        with pytest.raises(StoreIntegrityError, match="restore the store from a backup"):
            check(filled)
    assert main(["judgments", "report", filled]) == 15


TEXTS = {
    "changed": "UPDATE judgment_texts SET body = '\"changed\"' WHERE body LIKE '%good answer 1%'",
    "emptied": "UPDATE judgment_texts SET body = '' WHERE body LIKE '%good answer 1%'",
    "no JSON": "UPDATE judgment_texts SET body = 'x' WHERE body LIKE '%good answer 1%'",
    "a message": "UPDATE judgment_texts SET body = REPLACE(body, 'Sing', 'Dance') "
    "WHERE body LIKE '%Sing%'",
}


@pytest.mark.parametrize("change", TEXTS)
def test_no_changed_text_is_read(filled: str, change: str) -> None:
    tamper(filled, TEXTS[change])
    with JudgmentStore.open(filled) as store, pytest.raises(StoreIntegrityError):
        list(store.read())
    with pytest.raises(StoreIntegrityError, match="by hand"):
        check_store(filled)


@pytest.mark.parametrize("link", [2, 9])
def test_a_row_written_past_the_library_is_not_read(filled: str, link: int) -> None:
    """Even one whose id fits its content: it is in no batch of the chain."""
    opened = Database(filled, create=False, read_only=False)
    with opened.engine.execution_options(writer=True).begin() as connection:
        insert(connection, [judged(99)], link)
    with (
        JudgmentStore.open(filled) as store,
        pytest.raises(StoreIntegrityError, match=r"had 7 judgments and has 8|not in the chain"),
    ):
        store.count()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=judgments)
def test_the_quick_check_computes_the_judgments_own_id(tmp_path: Path, one: Judgment) -> None:
    """The check of columns builds the same text as `Judgment`, for every content."""
    place = tmp_path / "one.db"
    with JudgmentStore.create(place) as store:
        known = {(row.source, row.external_id): row.id for row in store.read()}
        if known.get((one.source, one.external_id), one.id) != one.id:
            return  # another example took the name
        store.add([one])
    opened = Database(place, create=False, read_only=True)
    with opened.reading() as connection:
        rows = connection.execute(raw_rows()).all()
        RowChecker(connection, "store").check(rows)
        for row in rows:
            for name in ("outcome", "annotator", "external_id", "judged_at", "subset"):
                changed = [value if n != name else "tie!" for n, value in row._mapping.items()]
                with pytest.raises(StoreIntegrityError):
                    RowChecker(connection, "store").check([tuple(changed)])


# Triggers -----------------------------------------------------------------------------------------


def trigger_names(place: str) -> list[str]:
    if place.startswith("postgresql"):
        return ["judgments_append_only", "judgment_texts_only_erased", "judgment_chain_append_only"]
    return ["judgments_no_update", "judgment_texts_no_replace", "judgment_chain_no_delete"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_store_without_a_trigger_is_not_opened(filled: str, which: int) -> None:
    name = trigger_names(filled)[which]
    on = f" ON {name.rsplit('_append', 1)[0].rsplit('_only', 1)[0]}" if "://" in filled else ""
    engine = Database(filled, create=False, read_only=False).engine
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TRIGGER {name}{on}")
    for read_only in (False, True):
        with pytest.raises(StoreIntegrityError, match=f"missing, disabled or altered: {name};"):
            JudgmentStore.open(filled, read_only=read_only)
    with pytest.raises(StoreIntegrityError):
        check_store(filled)
    assert main(["judgments", "report", filled]) == 15
    assert main(["judgments", "repair", filled]) == 0
    with JudgmentStore.open(filled) as store:
        assert store.count() == 20
    with engine.begin() as connection, pytest.raises(sa.exc.DBAPIError, match="append-only"):
        connection.exec_driver_sql("UPDATE judgments SET outcome = 'tie'")


def test_an_altered_trigger_is_no_trigger(tmp_path: Path) -> None:
    place = tmp_path / "store.db"
    JudgmentStore.create(place).close()
    with sqlite3.connect(place) as raw:
        raw.execute("DROP TRIGGER judgments_no_update")
        raw.execute(
            "CREATE TRIGGER judgments_no_update BEFORE UPDATE ON judgments WHEN 0 "
            "BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    raw.close()
    with pytest.raises(StoreIntegrityError, match="altered: judgments_no_update"):
        JudgmentStore.open(place)


def test_disabled_triggers_are_missing(filled: str) -> None:
    with Database(filled, create=False, read_only=False).engine.begin() as connection:
        drop_triggers(connection)
    with pytest.raises(StoreIntegrityError, match="ensemble-rm judgments repair"):
        JudgmentStore.create(filled)


# The chain ---------------------------------------------------------------------------------------


def test_every_batch_is_a_link_and_the_head_stands_for_all(filled: str, tmp_path: Path) -> None:
    with JudgmentStore.open(filled) as store:
        chain = store.chain()
        assert [link.judgments for link in chain.links] == [12, 7, 2]
        assert [link.number for link in chain.links] == [1, 2, 3]
        assert chain.judgments == 21 == store.count(HISTORY)
        assert all(link.appended_at is not None for link in chain.links)
        store.add([NEW, OLD])  # nothing new, no link
        assert store.chain() == chain
        assert {row.link for row in store.observations(JudgmentFilter(batch="b"))} == {1}
        store.add([judged(61)])
        later = store.chain()
    assert later.has_head(chain.head) and not chain.has_head(later.head)
    empty = JudgmentStore.create(tmp_path / "empty.db").chain()
    assert later.has_head(empty.head) and empty.judgments == 0


def test_writers_at_once_make_one_chain(store_place: str) -> None:
    def write(number: int) -> None:
        with JudgmentStore.create(store_place) as store:
            for start in range(0, 30, 10):
                store.add(many(10, start=1000 * number + start))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    checked = check_store(store_place)
    assert (checked.judgments, checked.batches) == (180, 18)


def test_a_snapshot_is_one_state(filled: str) -> None:
    with JudgmentStore.open(filled) as store, JudgmentStore.open(filled) as other:
        with store.snapshot() as chain:
            before = store.count(), store.digest(), store.newest()
            other.add([judged(70)])
            assert (store.count(), store.digest(), store.newest()) == before
            with store.snapshot() as again:
                assert again is chain
        assert store.count() == before[0] + 1


# Stores of the first release ---------------------------------------------------------------------


@pytest.fixture
def old_place(store_place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    rows = [*many(12), judged(4).corrected("tie", judged_at=NEW_YEAR + timedelta(days=9))]
    make_old_store(store_place, rows, tmp_path, monkeypatch)
    return store_place


def test_an_old_store_is_chained_as_it_is(old_place: str) -> None:
    with pytest.raises(StorageError, match="ensemble-rm judgments repair"):
        JudgmentStore.open(old_place, read_only=True)
    with ThreadPoolExecutor(3) as pool:
        for store in pool.map(JudgmentStore.open, [old_place] * 3):
            assert store.count() == 12 and store.count(HISTORY) == 13
            chain = store.chain()
            assert chain.judgments == 13
            assert all(link.appended_at is None for link in chain.links)
    with JudgmentStore.open(old_place) as store:
        store.add([judged(40)])
        assert store.chain().links[-1].appended_at is not None
    assert check_store(old_place).judgments == 14


def test_a_changed_old_store_is_not_vouched_for(old_place: str) -> None:
    opened = sa.create_engine(_url(old_place), poolclass=sa.NullPool)
    with opened.begin() as connection:
        if "://" in old_place:
            connection.exec_driver_sql("ALTER TABLE judgments DISABLE TRIGGER ALL")
        else:
            connection.exec_driver_sql("DROP TRIGGER judgments_no_update")
        connection.exec_driver_sql("UPDATE judgments SET outcome = 'tie' WHERE outcome = 'first'")
    with pytest.raises(StoreIntegrityError, match="was changed by hand"):
        JudgmentStore.open(old_place)
    with opened.connect() as connection:
        assert not sa.inspect(connection).has_table("judgment_chain")


def _url(place: str) -> str:
    if "://" in place:
        return place.replace("postgresql:", "postgresql+psycopg:")
    return f"sqlite:///{place}"
