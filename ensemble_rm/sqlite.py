"""What every SQLite file of the library needs when several processes open it at once.

Knows connections; knows nothing of tables.
"""

from __future__ import annotations

import sqlite3
import time

BUSY_SECONDS = 120.0  # that others may keep a file locked


def set_wal(connection: sqlite3.Connection) -> None:
    """Let readers and one writer work at once; others may be setting it, too.

    SQLite's own time-out does not cover this statement.

    Parameters
    ----------
    connection : sqlite3.Connection
        Outside a transaction.

    Raises
    ------
    sqlite3.Error
        If the file stays locked for `BUSY_SECONDS`, or is no database.
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
