"""Stores that are changed past the library: triggers out of the way, and back in their place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from ensemble_rm.judgments.database import engine as database
from ensemble_rm.judgments.database.engine import MIGRATIONS, Database
from ensemble_rm.judgments.database.guards import install_guards
from ensemble_rm.judgments.database.tables import judgments as table, texts
from ensemble_rm.judgments.database.writing import _columns
from ensemble_rm.judgments.judgment import Judgment, text_body

TABLES = ("judgments", "judgment_texts", "judgment_chain", "judgment_erasures")


def drop_triggers(connection: sa.Connection) -> None:
    """Take the triggers away, as somebody would who wants to change a row."""
    if connection.dialect.name == "sqlite":
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'trigger'")
        for (name,) in names.all():
            connection.exec_driver_sql(f"DROP TRIGGER {name}")
        connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
    else:
        for name in TABLES:
            connection.exec_driver_sql(f"ALTER TABLE {name} DISABLE TRIGGER ALL")


@contextmanager
def without_triggers(place: str) -> Iterator[sa.Connection]:
    """A connection that may change anything; afterwards the triggers are as before."""
    opened = Database(place, create=False, read_only=False, repair=True)
    with opened.engine.execution_options(writer=True).begin() as connection:
        drop_triggers(connection)
        yield connection
        if connection.dialect.name == "postgresql":
            for name in TABLES:
                connection.exec_driver_sql(f"ALTER TABLE {name} ENABLE TRIGGER ALL")
        install_guards(connection)


def tamper(place: str, statement: str) -> None:
    """Say SQL past the triggers; it changes at least one row."""
    with without_triggers(place) as connection:
        assert connection.execute(sa.text(statement)).rowcount > 0


@contextmanager
def first_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this the library whose newest schema is 0001."""
    folder = tmp_path / "first migrations"
    ignored = shutil.ignore_patterns("__pycache__", "v0002*", "v0003*")
    shutil.copytree(MIGRATIONS, folder, ignore=ignored)
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", folder)
        patch.setattr(database, "REVISIONS", ("0001",))
        patch.setattr(database, "HEAD", "0001")
        patch.setattr(database, "install_guards", lambda connection: None)
        patch.setattr(database, "check_guards", lambda connection, store: None)
        yield


def make_old_store(
    place: str, rows: list[Judgment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write a store as the first release did, before there was a chain."""
    with first_release(tmp_path, monkeypatch):
        opened = Database(place, create=True, read_only=False)
    bodies: dict[bytes, Any] = {}
    for one in rows:
        bodies.update(zip(one.text_digests, (one.prompt, one.first, one.second), strict=True))
    columns = [column for column in table.c if column.name != "link"]
    old: Callable[..., Any] = sa.table(
        "judgments", *(sa.column(c.name, c.type) for c in columns)
    ).insert
    with opened.engine.execution_options(writer=True).begin() as connection:
        body = [{"digest": key, "body": text_body(value)} for key, value in bodies.items()]
        connection.execute(texts.insert(), body)
        connection.execute(old(), [_columns(one) for one in rows])
    opened.engine.dispose()
