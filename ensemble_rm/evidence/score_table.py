"""Stored scores of judged pairs: an ensemble scores each pair only once.

One SQLite file per ensemble, in the folder of the versions, named by the digest of its members. A
row has both sides' normalised scores under the pair's digest; a second table has both sides'
distances to the training features, if the ensemble has a feature space. A job that writes holds the
folder's lock.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import StorageError
from ensemble_rm.sqlite import read_blobs
from ensemble_rm.versions.atomic_files import storage_errors

FOLDER = "scores"
KEY = 16  # bytes of a pair's digest
BLOCK = 10_000  # pairs whose scores are in memory at a time

Keys: TypeAlias = NDArray[np.bytes_]
"""Digests of pairs, dtype S16, sorted."""


class ScoreTable:
    """Both sides' scores of pairs, by one ensemble.

    Parameters
    ----------
    folder : Path
        Of the versions.
    members : str
        Digest of the ensemble's members and normaliser.
    read_only : bool
        Neither write nor create the file.
    """

    def __init__(self, folder: Path, members: str, *, read_only: bool) -> None:
        self.path = folder / FOLDER / f"{members[:32]}.sqlite"
        self.read_only = read_only
        if not read_only:
            with storage_errors(f"creating {self.path}"):
                self.path.parent.mkdir(exist_ok=True)
            with self._open() as db, db:
                for table in ("scores", "distances"):
                    db.execute(
                        f"CREATE TABLE IF NOT EXISTS {table} "
                        "(pair BLOB PRIMARY KEY, sides BLOB NOT NULL) WITHOUT ROWID"
                    )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        mode = "ro" if self.read_only else "rwc"
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=60)) as db:
                yield db
        except sqlite3.Error as error:
            raise StorageError(
                f"the scores in {self.path} cannot be read or written ({error}); free disk space, "
                "or delete the file, and it is computed again"
            ) from error

    def blocks(self, keys: Keys) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """Read scores, `BLOCK` pairs at a time.

        Parameters
        ----------
        keys : ndarray of S16, shape (n_pairs,)
            Sorted, each once.

        Yields
        ------
        rows : ndarray of int, shape (m,)
            Indices into `keys` of the pairs that are stored.
        sides : ndarray, shape (m, 2, n_members)
            Their scores; the side with the lower digest first.
        """
        yield from self._blocks("scores", keys)

    def distances(self, keys: Keys) -> Floats:
        """Read both sides' distances to the training features.

        Parameters
        ----------
        keys : ndarray of S16, shape (n_pairs,)
            Sorted, each once.

        Returns
        -------
        ndarray, shape (n_pairs, 2)
            NaN where none is stored.
        """
        distances = np.full((len(keys), 2), np.nan)
        for rows, sides in self._blocks("distances", keys):
            distances[rows] = sides[:, :, 0]
        return distances

    def _blocks(self, table: str, keys: Keys) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        if not self.path.exists():
            return
        with self._open() as db:
            if not _has(db, table):  # an old file without distances, opened read-only
                return
            for start in range(0, len(keys), BLOCK):
                block = keys[start : start + BLOCK]
                # By bytes: an element of an S16 array would lose trailing zero bytes.
                raw = block.tobytes()
                pairs = [raw[i : i + KEY] for i in range(0, len(raw), KEY)]
                blobs = dict(read_blobs(db, table, pairs, key="pair", value="sides"))
                if blobs:
                    stored = np.frombuffer(b"".join(blobs), dtype=f"S{KEY}")
                    scores = np.frombuffer(b"".join(blobs.values()), dtype="<f8")
                    yield start + np.searchsorted(block, stored), scores.reshape(len(blobs), 2, -1)

    def put(self, pairs: list[bytes], sides: Floats, distances: Floats | None = None) -> None:
        """Store the scores of pairs, and their distances, in one transaction.

        Parameters
        ----------
        pairs : list of bytes
            Digests, 16 bytes each.
        sides : ndarray, shape (n_pairs, 2, n_members)
        distances : ndarray, shape (n_pairs, 2), optional
        """
        with self._open() as db, db:
            _insert(db, "scores", pairs, sides)
            if distances is not None:
                _insert(db, "distances", pairs, distances)  # in the same transaction as the scores


def _has(db: sqlite3.Connection, table: str) -> bool:
    rows = db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,))
    return rows.fetchone() is not None


def _insert(db: sqlite3.Connection, table: str, pairs: list[bytes], values: Floats) -> None:
    # Little-endian on every machine, as `_blocks` reads it.
    rows = np.ascontiguousarray(values, dtype="<f8")
    db.executemany(
        f"INSERT OR REPLACE INTO {table} (pair, sides) VALUES (?, ?)",
        ((pair, row.tobytes()) for pair, row in zip(pairs, rows, strict=True)),
    )
