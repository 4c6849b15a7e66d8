"""Copy a judgment store to a file while other processes read and write it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from ensemble_rm.errors import OptionError, StorageError
from ensemble_rm.judgments.store import JudgmentStore

_PAGES = 4096  # copied at a time, so that writers can proceed in between


def backup_store(place: str | Path, target: str | Path) -> tuple[int, str]:
    """Copy a SQLite store to a new file, by SQLite's online backup.

    Parameters
    ----------
    place : str or Path
        The store's file.
    target : str or Path
        A new file. It is written as ``target.partial``, checked, and then renamed.

    Returns
    -------
    count : int
        Judgments in the copy.
    digest : str
        Their digest, as `JudgmentStore.digest` returns it.

    Raises
    ------
    OptionError
        If the store is not a file, or the target exists.
    StorageError
        If there is no store, it cannot be read, or the copy is damaged.
    """
    if "://" in str(place):
        raise OptionError(
            "only a SQLite store is copied as a file; use pg_dump for PostgreSQL, or "
            "ensemble-rm judgments export"
        )
    source, target = Path(place).expanduser(), Path(target).expanduser()
    if target.exists():
        raise OptionError(f"{target} exists; name a new file")
    JudgmentStore.open(source, read_only=True).close()  # raises a clear error if it is not a store
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as reader,
            closing(sqlite3.connect(partial)) as writer,
        ):
            reader.backup(writer, pages=_PAGES)
            # Without WAL the copy is a single file, with no log that could be left behind.
            writer.execute("PRAGMA journal_mode=DELETE")
            result = writer.execute("PRAGMA integrity_check").fetchone()[0]
        if result != "ok":
            raise StorageError(f"the copy of {source} is damaged: {result}")
        with JudgmentStore.open(partial, read_only=True) as store:
            described = store.count(), store.digest()
    except sqlite3.Error as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{source} cannot be copied to {target}: {error}") from error
    partial.replace(target)
    return described
