"""The store's laws, the same in SQLite and PostgreSQL: it only grows, and says what it holds."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings, strategies as st

from ensemble_rm.errors import (
    DataError,
    JudgmentConflictError,
    OptionError,
    StorageError,
)
from ensemble_rm.judgments.database import writing
from ensemble_rm.judgments.database.engine import Database
from ensemble_rm.judgments.database.tables import HEAD, judgments as judgments_table, metadata
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import Added, JudgmentStore
from tests.support.judgment_rows import CHAT, NEW_YEAR, judged, judgments, many


@pytest.fixture
def store(store_place: str) -> JudgmentStore:
    return JudgmentStore.create(store_place)


@pytest.fixture
def ask(store_place: str, store: JudgmentStore) -> Callable[..., Any]:
    """Say SQL to the database, past the library."""
    url = f"sqlite:///{store_place}"
    if store_place.startswith("postgresql"):
        url = store_place.replace("postgresql:", "postgresql+psycopg:")
    engine = sa.create_engine(url, poolclass=sa.NullPool)

    def execute(statement: str) -> list[Any]:
        with engine.begin() as connection:
            done = connection.exec_driver_sql(statement)
            return list(done) if done.returns_rows else []

    return execute


def ids(found: Any) -> list[str]:
    return [one.id for one in found]


def by_time(rows: list[Judgment]) -> list[Judgment]:
    return sorted(rows, key=lambda one: (one.judged_at, one.id))


# What goes in comes out -------------------------------------------------------------------------


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(judgments, max_size=8, unique_by=lambda one: (one.source, one.external_id)))
def test_what_is_added_is_read_back(store: JudgmentStore, rows: list[Judgment]) -> None:
    """The store outlives the examples, so each looks for its own rows."""
    held = {(one.source, one.external_id): one.id for one in store.read()}
    rows = [one for one in rows if held.get((one.source, one.external_id), one.id) == one.id]
    store.add(rows)
    stored = {one.id: one for one in store.read()}
    assert [stored[one.id] for one in rows] == rows


def test_reading_goes_by_time_whatever_the_order_of_adding(store: JudgmentStore) -> None:
    rows = many(50, prompt=CHAT)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert store.add(shuffled) == Added(50, 0)
    assert list(store.read()) == rows
    assert store.count() == 50


def test_a_store_that_is_opened_again_holds_the_same(
    store: JudgmentStore, store_place: str
) -> None:
    store.add(many(9))
    store.close()
    with JudgmentStore.open(store_place) as again:
        assert list(again.read()) == many(9)
    with JudgmentStore.create(store_place) as again:
        assert again.count() == 9


def test_adding_again_changes_nothing(store: JudgmentStore) -> None:
    rows = many(20)
    assert store.add(rows[:12]) == Added(12, 0)
    digest = store.digest()
    assert store.add([*rows[:12], *rows[:12]]) == Added(0, 24)
    assert store.digest() == digest
    assert store.add(rows) == Added(8, 12)
    assert store.digest() != digest


def test_the_digest_knows_content_alone(store: JudgmentStore, tmp_path: Path) -> None:
    """Equal for equal judgments: in another order, in batches, in another database."""
    rows = many(30)
    other = JudgmentStore.create(tmp_path / "other.db")
    store.add(rows)
    for row in reversed(rows):
        other.add([row])
    assert store.digest() == other.digest()
    window = JudgmentFilter(since=rows[10].judged_at)
    assert store.digest(window) == other.digest(window) != store.digest()


def test_a_transaction_is_all_or_nothing(store: JudgmentStore) -> None:
    wrong = judged(3, external_id="taken")
    store.add([judged(99, external_id="taken")])
    with pytest.raises(JudgmentConflictError):
        store.add([*many(3), wrong, *many(3, start=4)])
    assert store.count() == 1


def test_progress_counts_what_was_read(store: JudgmentStore) -> None:
    said: list[tuple[str, int, int]] = []
    store.add(iter(many(7)), progress=lambda *heard: said.append(heard))
    assert said[-1] == ("adding", 7, 0)


# Which ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        (JudgmentFilter(since=NEW_YEAR + timedelta(hours=5)), lambda one: one.judged_at.day > 1
         or one.judged_at.hour >= 5),
        (JudgmentFilter(until=NEW_YEAR + timedelta(hours=5)), lambda one: one.judged_at.day == 1
         and one.judged_at.hour < 5),
        (JudgmentFilter(annotator="annotator 1"), lambda one: one.annotator == "annotator 1"),
        (JudgmentFilter(batch=("b0", "b2")), lambda one: one.batch in ("b0", "b2")),
        (JudgmentFilter(batch="b1", subset="s"), lambda j: j.batch == "b1" and j.subset == "s"),
        (JudgmentFilter(policy="none such"), lambda one: False),
        (JudgmentFilter(source=()), lambda one: False),
    ],
    ids=["since", "until", "annotator", "batches", "both", "none", "no name"],
)  # fmt: skip
def test_a_selection_is_a_filter(
    store: JudgmentStore, where: JudgmentFilter, keep: Callable[[Judgment], bool]
) -> None:
    rows = [judged(i, batch=f"b{i % 4}", subset="s" if i % 3 else None) for i in range(48)]
    store.add(rows)
    wanted = [one for one in rows if keep(one)]
    assert list(store.read(where)) == wanted
    assert store.count(where) == len(wanted)
    assert len(list(store.verdicts(where))) == len(wanted)


def test_verdicts_are_the_judgments_without_their_texts(store: JudgmentStore) -> None:
    store.add(many(30))
    for one, verdict in zip(store.read(), store.verdicts(), strict=True):
        assert verdict.pair == one.pair_digest
        assert verdict.prompt == one.prompt_digest
        assert (verdict.annotator, verdict.outcome) == (one.annotator, one.outcome)
        _, first, second = one.text_digests
        assert verdict.flipped == (first > second)


def test_preferences_are_the_votes_of_what_is_selected(store: JudgmentStore) -> None:
    store.add(many(31))
    found = store.preferences()
    assert sum(pair.weight for pair in found) == 31
    assert found.source == store.name
    later = store.preferences(JudgmentFilter(since=NEW_YEAR + timedelta(hours=15)))
    assert sum(pair.weight for pair in later) == 16


def test_a_stream_sees_one_state_of_the_store(store: JudgmentStore, store_place: str) -> None:
    store.add(many(2500))
    stream = store.read()
    head = [next(stream) for _ in range(10)]
    with JudgmentStore.open(store_place) as other:
        other.add(many(500, start=2500))
    assert len(head) + sum(1 for _ in stream) == 2500
    assert store.count() == 3000


# Corrections ------------------------------------------------------------------------------------


def test_a_correction_takes_the_place_of_the_old(store: JudgmentStore) -> None:
    old = judged(0, outcome="first")
    new = old.corrected("tie", judged_at=NEW_YEAR + timedelta(days=3))
    newest = new.corrected("second", judged_at=NEW_YEAR + timedelta(days=4))
    store.add([old, judged(1)])
    store.add([new])
    assert ids(store.read()) == [judged(1).id, new.id]
    store.add([newest])
    assert ids(store.read()) == [judged(1).id, newest.id]
    assert store.count() == len(list(store.verdicts())) == 2
    history = JudgmentFilter(with_corrected=True)
    assert ids(store.read(history)) == ids([old, judged(1), new, newest])
    assert store.digest() != store.digest(history)


def test_a_correction_may_come_before_what_it_corrects(store: JudgmentStore) -> None:
    old = judged(0)
    new = old.corrected("tie", judged_at=NEW_YEAR + timedelta(days=3))
    newest = new.corrected("second", judged_at=NEW_YEAR + timedelta(days=4))
    assert store.add([newest, new, old]) == Added(3, 0)
    assert ids(store.read()) == [newest.id]


def test_a_correction_in_an_earlier_batch_waits(
    store: JudgmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensemble_rm.judgments.store.BATCH", 4)
    old = judged(50)
    new = old.corrected("tie", judged_at=NEW_YEAR + timedelta(days=9))
    assert store.add([new, *many(9), old, judged(60)]) == Added(12, 0)
    assert new.id in ids(store.read()) and old.id not in ids(store.read())


def test_a_correction_of_nothing_is_refused(store: JudgmentStore) -> None:
    with pytest.raises(DataError, match=f"`corrects` {'0' * 32}: no such judgment"):
        store.add([*many(3), judged(7, corrects="0" * 32)])
    assert store.count() == 0


def test_a_judgment_is_corrected_once(store: JudgmentStore) -> None:
    old = judged(0)
    new = old.corrected("tie", judged_at=NEW_YEAR + timedelta(days=3))
    store.add([old, new])
    rival = old.corrected("second", judged_at=NEW_YEAR + timedelta(days=4))
    with pytest.raises(JudgmentConflictError, match=f"already has a correction, {new.id}"):
        store.add([rival])
    assert ids(store.read()) == [new.id]


CHANGED = {
    "by annotator 'someone else', the judgment by 'annotator 0'": {"annotator": "someone else"},
    "another prompt": {"prompt": "another prompt"},
    "another pair of completions": {"second": "another answer"},
    r"dated 2026-01-02T23:59:59\+00:00, before": {
        "judged_at": NEW_YEAR + timedelta(seconds=172799)
    },
}


@pytest.mark.parametrize("said", CHANGED)
@pytest.mark.parametrize("together", [False, True])
def test_a_correction_that_would_hide_another_verdict_is_refused(
    store: JudgmentStore, said: str, *, together: bool
) -> None:
    """Whether it comes with its target or after it; the first verdict stays the one that counts."""
    old = judged(0, judged_at=NEW_YEAR + timedelta(days=2))
    changes = {"judged_at": NEW_YEAR + timedelta(days=3), **CHANGED[said]}
    hiding = replace(old, outcome="tie", external_id="", corrects=old.id, **changes)
    if not together:
        store.add([old])
    with pytest.raises(DataError, match=f"`corrects` {old.id}: the correction .*{said}"):
        store.add([hiding, old] if together else [hiding])
    assert ids(store.read()) == ([] if together else [old.id])
    with pytest.raises(DataError, match=said):
        old.corrected("tie", **changes)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    old=judgments,
    later=st.timedeltas(timedelta(0), timedelta(days=900)),
    other=st.sampled_from(["outcome", "batch", "policy", "subset", "source", "sides"]),
)
def test_a_correction_may_change_all_else(
    store: JudgmentStore, old: Judgment, later: timedelta, other: str
) -> None:
    old = replace(old, external_id=uuid4().hex)  # the store outlives the examples
    changes = {"sides": {"first": old.second, "second": old.first}, "outcome": {}}.get(
        other, {other: "changed"}
    )
    new = old.corrected("tie", judged_at=old.judged_at + later, **changes)
    assert store.add([new, old]) == Added(2, 0)
    assert new.id in ids(store.read()) and old.id not in ids(store.read())


def test_a_correction_that_an_earlier_release_accepted_is_no_problem(
    store: JudgmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = judged(0)
    hiding = judged(1, corrects=old.id)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "changed_identity", lambda new, old: None)
        store.add([old, hiding])
    assert store.add([old, hiding]) == Added(0, 2)


def test_an_external_id_names_one_judgment_of_its_source(store: JudgmentStore) -> None:
    store.add([judged(0, external_id="7")])
    with pytest.raises(JudgmentConflictError, match=r"'7' of source 'test'.*add a correction"):
        store.add([judged(1, external_id="7")])
    assert store.add([judged(1, external_id="7", source="elsewhere")]) == Added(1, 0)


# Append-only, by the database itself -------------------------------------------------------------


@pytest.mark.parametrize("table", ["judgments", "judgment_texts"])
@pytest.mark.parametrize("deed", ["UPDATE {} SET {} = {}", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
def test_the_database_refuses_to_change_or_to_forget(
    store: JudgmentStore, ask: Callable[..., Any], store_place: str, table: str, deed: str
) -> None:
    if deed.startswith("TRUNCATE") and not store_place.startswith("postgresql"):
        pytest.skip("SQLite has no TRUNCATE; its DELETE is refused")
    store.add(many(6))
    column = {"judgments": "outcome", "judgment_texts": "body"}[table]
    with pytest.raises(sa.exc.DBAPIError, match=r"append-only: no (UPDATE|DELETE|TRUNCATE)"):
        ask(deed.format(table, column, "'tie'"))
    assert list(store.read()) == many(6)


def test_sqlite_does_not_replace_either(tmp_path: Path) -> None:
    store = JudgmentStore.create(tmp_path / "store.db")
    store.add(many(3))
    with sqlite3.connect(tmp_path / "store.db") as raw:
        raw.execute(
            "INSERT OR REPLACE INTO judgments SELECT id, prompt, first, second, prompt_key, "
            "pair_key, 'tie', annotator, judged_at, source, external_id, batch, policy, subset, "
            "strategy, inclusion, corrects, link FROM judgments"
        )
        raw.execute("REPLACE INTO judgment_texts SELECT digest, 'changed' FROM judgment_texts")
    raw.close()
    assert list(store.read()) == many(3)


def test_a_row_that_was_forged_is_found_out(
    store: JudgmentStore, ask: Callable[..., Any], store_place: str
) -> None:
    store.add(many(3))
    if store_place.startswith("postgresql"):
        ask("ALTER TABLE judgments DISABLE TRIGGER ALL")
    else:
        ask("DROP TRIGGER judgments_no_update")
    ask("UPDATE judgments SET outcome = 'tie' WHERE annotator = 'annotator 0'")
    with pytest.raises(StorageError, match="was changed by hand"):
        list(store.read())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"outcome": "'left'"}, "judgments_outcome"),
        ({"prompt": "id"}, "(?i)foreign key"),
        ({"corrects": "prompt"}, "(?i)foreign key"),
        ({"external_id": "NULL"}, "(?i)not.null"),
    ],
    ids=["outcome", "text", "correction", "name"],
)
def test_the_tables_refuse_what_the_library_would_not_write(
    store: JudgmentStore, store_place: str, change: dict[str, str], said: str
) -> None:
    store.add(many(1))
    row = {column.name: column.name for column in judgments_table.c}
    row |= {"id": "second", "external_id": "'x'", **change}
    names, values = ", ".join(row), ", ".join(row.values())
    statement = f"INSERT INTO judgments ({names}) SELECT {values} FROM judgments"
    database = Database(store_place, create=False, read_only=False)
    with pytest.raises(sa.exc.IntegrityError, match=said), database.engine.begin() as connection:
        connection.exec_driver_sql(statement)
    assert store.count() == 1


# Opening ----------------------------------------------------------------------------------------


def test_the_migrations_make_the_tables_that_are_asked(
    store: JudgmentStore, store_place: str
) -> None:
    """The newest migration leaves what tables.py describes: Alembic finds nothing to change."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database = Database(store_place, create=False, read_only=True)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": "judgments_version", "compare_type": False}
        )
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == HEAD


def test_a_newer_schema_is_refused(
    store: JudgmentStore, ask: Callable[..., Any], store_place: str
) -> None:
    ask("UPDATE judgments_version SET version_num = '9999'")
    for opening in (JudgmentStore.open, JudgmentStore.create):
        with pytest.raises(StorageError, match=r"9999.*install a newer ensemble-rm"):
            opening(store_place)
    with pytest.raises(StorageError, match="9999"):
        JudgmentStore.open(store_place, read_only=True)


def test_an_empty_place_is_no_store(store_place: str) -> None:
    for read_only in (False, True):
        with pytest.raises(StorageError, match="no judgment store"):
            JudgmentStore.open(store_place, read_only=read_only)


def test_what_was_opened_for_reading_writes_nothing(store: JudgmentStore, store_place: str) -> None:
    store.add(many(5))
    with JudgmentStore.open(store_place, read_only=True) as reader:
        assert list(reader.read()) == many(5)
        assert reader.digest() == store.digest()
        with pytest.raises(StorageError, match="was opened read-only"):
            reader.add(many(1, start=9))
    database = Database(store_place, create=False, read_only=True)
    with database.engine.connect() as connection, pytest.raises(sa.exc.DBAPIError):
        connection.execute(sa.text("DROP TABLE judgments"))
    assert store.count() == 5


def test_several_may_create_at_once(store_place: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: JudgmentStore.create(store_place), range(6)))
        added = pool.map(lambda i: stores[i].add(many(40, start=20 * i)), range(6))
        assert sum(found.added for found in added) == 140
    assert list(stores[0].read()) == many(140)


def test_sqlite_writes_ahead(tmp_path: Path) -> None:
    path = tmp_path / "new" / "store.db"
    JudgmentStore.create(path)
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are no judgments " * 100)
    with pytest.raises(StorageError, match=r"notes\.txt: file is not a database"):
        JudgmentStore.create(path)
    assert path.read_text() == "these are no judgments " * 100


@pytest.mark.parametrize("place", ["mysql://host/db", "sqlite:///file.db", "http://host/"])
def test_other_databases_are_refused(place: str) -> None:
    with pytest.raises(OptionError, match="postgresql:// URL"):
        JudgmentStore.create(place)


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(StorageError, match=r"\*\*\*@localhost:1/x: ") as caught:
        JudgmentStore.create("postgresql://me:hunter2@localhost:1/x")
    assert "hunter2" not in str(caught.value)
