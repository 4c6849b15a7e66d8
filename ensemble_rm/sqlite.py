"""Helpers for the library's SQLite files: write-ahead logging, and reads of many keys."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence

BUSY_SECONDS = 120.0  # maximum wait for a lock of another process
KEYS_PER_QUERY = 500  # per statement; SQLite limits its number of variables


def set_wal(connection: sqlite3.Connection) -> None:
    """Turn on write-ahead logging, so that readers and one writer work at the same time.

    Another process may turn it on at the same time, and SQLite's own timeout does not cover this
    statement, so it is retried here.

    Parameters
    ----------
    connection : sqlite3.Connection
        Outside a transaction.

    Raises
    ------
    sqlite3.Error
        If the file stays locked for `BUSY_SECONDS`, or is not a database.
    """
    give_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.01)


def read_blobs(
    db: sqlite3.Connection, table: str, keys: Sequence[bytes], *, key: str, value: str
) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of the keys that a table contains, in no particular order.

    Parameters
    ----------
    db : sqlite3.Connection
    table, key, value : str
        Names of the table and its columns; never from user input.
    keys : sequence of bytes
        Any number.
    """
    for start in range(0, len(keys), KEYS_PER_QUERY):
        part = list(keys[start : start + KEYS_PER_QUERY])
        marks = ",".join("?" * len(part))
        yield from db.execute(f"SELECT {key}, {value} FROM {table} WHERE {key} IN ({marks})", part)
