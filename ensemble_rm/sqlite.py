"""SQLite files that several processes open at once."""

from __future__ import annotations

import sqlite3
import time

BUSY_SECONDS = 120.0  # how long to wait for another process's lock


def set_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging, so that readers and one writer work at the same time.

    Another process may be switching too, and SQLite's own timeout does not cover this statement,
    so it is retried here.

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
