"""Schemas that change, brought up to date once, whole or not at all; packages that are missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from ensemble_rm.errors import StorageError
from ensemble_rm.judgments.database import engine as database
from ensemble_rm.judgments.database.engine import MIGRATIONS, Database
from ensemble_rm.judgments.store import JudgmentStore
from tests.support import CHECKOUT
from tests.support.judgment_rows import many

STEP = """\
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0003", "0002", None, None


def upgrade() -> None:
    op.add_column("judgments", sa.Column("note", sa.Text))
    {then}
"""


@pytest.fixture
def next_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this the library that comes next, with a second migration; give the migration's file."""
    folder = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "versions" / "v0003_note.py"
    file.write_text(STEP.format(then="pass"))
    monkeypatch.setattr(database, "MIGRATIONS", folder)
    monkeypatch.setattr(database, "REVISIONS", ("0001", "0002", "0003"))
    monkeypatch.setattr(database, "HEAD", "0003")
    return file


def columns(place: str) -> set[str]:
    engine = Database(place, create=False, read_only=True).engine
    with engine.connect() as connection:
        return {column["name"] for column in sa.inspect(connection).get_columns("judgments")}


@pytest.fixture
def old_place(store_place: str) -> str:
    """A store that this library made, before the next one came."""
    with JudgmentStore.create(store_place) as store:
        store.add(many(20))
    return store_place


def test_an_older_store_is_brought_up_to_date(old_place: str, next_library: Path) -> None:
    with pytest.raises(StorageError, match="the schema 0002, this library 0003"):
        JudgmentStore.open(old_place, read_only=True)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(JudgmentStore.open, [old_place] * 4))
    assert "note" in columns(old_place)
    assert all(list(store.read()) == many(20) for store in stores)
    stores[0].add(many(5, start=20))
    assert stores[1].count() == 25
    engine = Database(old_place, create=False, read_only=False).engine
    with engine.connect() as connection, pytest.raises(sa.exc.DBAPIError, match="append-only"):
        connection.exec_driver_sql("UPDATE judgments SET note = 'x'")


def test_a_new_store_runs_every_step(store_place: str, next_library: Path) -> None:
    JudgmentStore.create(store_place).add(many(3))
    assert "note" in columns(store_place)


def test_a_migration_that_fails_changes_nothing(
    old_place: str, next_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_library.write_text(STEP.format(then="raise RuntimeError('no')"))
    with pytest.raises(RuntimeError, match="no"):
        JudgmentStore.open(old_place)
    monkeypatch.undo()  # back to this library
    assert "note" not in columns(old_place)
    with JudgmentStore.open(old_place) as store:
        assert list(store.read()) == many(20)


@pytest.mark.parametrize(
    ("missing", "place", "extra"),
    [
        ("sqlalchemy", "x.db", "ensemble-rm[judgments]"),
        ("alembic", "x.db", "ensemble-rm[judgments]"),
        ("psycopg", "postgresql://localhost/x", "ensemble-rm[postgresql]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, missing: str, place: str, extra: str
) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from ensemble_rm import Judgment, JudgmentStore, import_judgments\n"
        "from ensemble_rm.judgments import JudgmentFilter\n"
        "from ensemble_rm.errors import MissingExtraError\n"
        f"try: JudgmentStore.create({str(tmp_path / place) if '://' not in place else place!r})\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert extra in done.stdout and missing in done.stdout.lower()
