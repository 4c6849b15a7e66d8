"""A store of vectors under byte keys: an SQLite file that several processes may share.

Its size is bounded: a full store deletes its oldest entries.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.errors import OptionError, StorageError
from ensemble_rm.sqlite import BUSY_SECONDS, read_blobs, set_wal


class VectorStore:
    """A bounded key–value store of vectors.

    Parameters
    ----------
    folder : Path
        Folder of ``NAME.sqlite``; created if missing.
    name : str
        Name of the file and its table.
    dtype : str
        Dtype of the vectors, with byte order: ``"<f4"`` or ``"<f8"``.
    max_bytes : int
        Maximum size of vectors and `overhead`; beyond it, the oldest are deleted.
    overhead : int
        Bytes per entry in addition to its vector.
    """

    def __init__(
        self, folder: Path, *, name: str, dtype: str, max_bytes: int, overhead: int = 0
    ) -> None:
        if max_bytes <= 0:
            raise OptionError(f"max_bytes must be positive, not {max_bytes}")
        self.path = folder.expanduser() / f"{name}.sqlite"
        self.max_bytes = max_bytes
        self._table, self._dtype, self._overhead = name, np.dtype(dtype), overhead
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot create the cache folder {self.path.parent}: {error}"
            ) from error
        with self._open() as db:
            set_wal(db)
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {name} "
                "(id INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, vector BLOB NOT NULL)"
            )
            # A running total: summing all lengths at every write would read the whole table.
            db.execute("CREATE TABLE IF NOT EXISTS held (id INTEGER PRIMARY KEY, bytes INTEGER)")
            db.execute(
                "INSERT OR IGNORE INTO held (id, bytes) SELECT 1, "
                f"COALESCE(SUM(LENGTH(vector) + {overhead}), 0) FROM {name} "
                "WHERE NOT EXISTS (SELECT 1 FROM held)"
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as db, db:
                yield db
        except sqlite3.Error as error:
            raise StorageError(
                f"cannot use the cache {self.path} ({error}); delete it, or use another folder"
            ) from error

    def get(self, keys: Sequence[bytes]) -> dict[bytes, NDArray[Any]]:
        """Return the vectors of the keys that are stored."""
        with self._open() as db:
            rows = read_blobs(db, self._table, keys, key="key", value="vector")
            return {key: np.frombuffer(blob, dtype=self._dtype) for key, blob in rows}

    def put(self, keys: Sequence[bytes], vectors: NDArray[Any]) -> None:
        """Store one vector per key; a stored key keeps its vector."""
        cost = vectors.shape[1] * self._dtype.itemsize + self._overhead
        with self._open() as db:
            # The first write takes SQLite's lock, so that no other process writes before the
            # total is updated.
            added = db.executemany(
                f"INSERT OR IGNORE INTO {self._table} (key, vector) VALUES (?, ?)",
                zip(keys, (v.astype(self._dtype).tobytes() for v in vectors), strict=True),
            ).rowcount
            db.execute("UPDATE held SET bytes = bytes + ?", (max(added, 0) * cost,))
            self._delete_oldest(db)

    def _delete_oldest(self, db: sqlite3.Connection) -> None:
        """Delete the oldest entries until the rest fits."""
        (held,) = db.execute("SELECT bytes FROM held").fetchone()
        freed, last = 0, 0
        oldest = db.execute(f"SELECT id, LENGTH(vector) FROM {self._table} ORDER BY id")
        while held - freed > self.max_bytes and (row := oldest.fetchone()) is not None:
            last, freed = row[0], freed + row[1] + self._overhead
        oldest.close()
        if last:
            db.execute(f"DELETE FROM {self._table} WHERE id <= ?", (last,))
            db.execute("UPDATE held SET bytes = bytes - ?", (freed,))

    def __len__(self) -> int:
        with self._open() as db:
            (count,) = db.execute(f"SELECT COUNT(*) FROM {self._table}").fetchone()
            return int(count)
