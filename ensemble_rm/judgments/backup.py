"""Copy a judgment store to a file while other processes read and write it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from ensemble_rm.errors import OptionError, StorageError
from ensemble_rm.judgments.checking import check_store
from ensemble_rm.judgments.store import JudgmentStore


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
    StoreIntegrityError
        If the store lost or changed judgments, which the copy would too.
    """
    if "://" in str(place):
        raise OptionError(
            "only a SQLite store is copied as a file; back up PostgreSQL with pg_dump "
            "--format=custom --file=OUT, or export the judgments with ensemble-rm judgments export"
        )
    source, target = Path(place).expanduser(), Path(target).expanduser()
    if target.exists():
        raise OptionError(f"{target} exists; name a new file")
    if not source.is_file():
        raise StorageError(f"no judgment store at {source}; use another path")
    partial = target.with_name(f"{target.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        _copy(source, partial)
        described = _check(partial)
        partial.replace(target)
    except sqlite3.Error as error:
        raise StorageError(f"{source} cannot be copied to {target}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)  # there only if something failed
    return described


def _copy(source: Path, target: Path) -> None:
    with (
        closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as reader,
        closing(sqlite3.connect(target)) as writer,
    ):
        # All pages in one read transaction, which does not block writers in WAL mode. Copying in
        # steps would start again after each of their commits.
        reader.backup(writer)
        # Without WAL the copy is a single file, with no log that could be left behind.
        writer.execute("PRAGMA journal_mode=DELETE")
        result = writer.execute("PRAGMA integrity_check").fetchone()[0]
    if result != "ok":
        raise StorageError(f"the copy of {source} is damaged: {result}")


def _check(copy: Path) -> tuple[int, str]:
    """Return count and digest of a checked copy; one of an earlier release stays as it is."""
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=f"{copy.name}-") as folder:
        # A copy of the copy, because opening a store of an earlier release migrates it.
        scratch = Path(folder) / "store.db"
        shutil.copyfile(copy, scratch)
        JudgmentStore.open(scratch).close()
        check_store(scratch)
        with JudgmentStore.open(scratch, read_only=True) as store:
            return store.count(), store.digest()
