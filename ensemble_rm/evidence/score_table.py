"""Scores of judged pairs, kept beside the versions: a pair is scored once by an ensemble.

One SQLite file an ensemble, named by the digest of its members; a row holds both sides' normalised
scores under the pair's name, another both sides' distances to the training features, where the
ensemble knows those. Its one writer holds the folder's lock. Knows nothing of texts.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.errors import StorageError
from ensemble_rm.versions.atomic_files import storage_errors

FOLDER = "scores"
KEY = 16  # bytes of a pair's name
AT_ONCE = 500  # keys a statement
BLOCK = 10_000  # pairs whose members' scores are in memory at once

Keys: TypeAlias = NDArray[np.bytes_]
"""Names of pairs, dtype S16, sorted."""


class ScoreTable:
    """Both sides' scores of pairs by one ensemble.

    Parameters
    ----------
    folder : Path
        Of the versions.
    members : str
        Digest of the ensemble's members and normaliser.
    read_only : bool
        Neither write nor make the file.
    """

    def __init__(self, folder: Path, members: str, *, read_only: bool) -> None:
        self.path = folder / FOLDER / f"{members[:32]}.sqlite"
        self.read_only = read_only
        if not read_only:
            with storage_errors(f"making {self.path}"):
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
                f"the scores in {self.path} cannot be read or written ({error}); make room there, "
                "or delete the file: it is computed anew"
            ) from error

    def blocks(self, keys: Keys) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """Read scores, some thousand pairs at a time.

        Parameters
        ----------
        keys : ndarray of S16, shape (n_pairs,)
            Sorted, each once.

        Yields
        ------
        places : ndarray of int, shape (m,)
            Where in `keys` those stand that are there.
        sides : ndarray, shape (m, 2, n_members)
            Their scores: the pair's own first side, then its second.
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
        found = np.full((len(keys), 2), np.nan)
        for places, sides in self._blocks("distances", keys):
            found[places] = sides[:, :, 0]
        return found

    def _blocks(self, table: str, keys: Keys) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        if not self.path.exists():
            return
        with self._open() as db:
            if not _has(db, table):  # written before there were distances, and read only
                return
            for start in range(0, len(keys), BLOCK):
                block = keys[start : start + BLOCK]
                names, blobs = _read(db, table, block)
                if names:
                    found = np.frombuffer(b"".join(names), dtype=f"S{KEY}")
                    sides = np.frombuffer(b"".join(blobs), dtype="<f8").reshape(len(names), 2, -1)
                    yield start + np.searchsorted(block, found), sides

    def put(self, names: list[bytes], sides: Floats, distances: Floats | None = None) -> None:
        """Store the scores of pairs, and their distances, all or none of them.

        Parameters
        ----------
        names : list of bytes
            One a pair, 16 bytes each.
        sides : ndarray, shape (n_pairs, 2, n_members)
        distances : ndarray, shape (n_pairs, 2), optional
        """
        with self._open() as db, db:
            _insert(db, "scores", names, sides)
            if distances is not None:
                _insert(db, "distances", names, distances)


def _has(db: sqlite3.Connection, table: str) -> bool:
    found = db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,))
    return found.fetchone() is not None


def _insert(db: sqlite3.Connection, table: str, names: list[bytes], values: Floats) -> None:
    rows = np.ascontiguousarray(values, dtype="<f8")
    db.executemany(
        f"INSERT OR REPLACE INTO {table} (pair, sides) VALUES (?, ?)",
        ((name, row.tobytes()) for name, row in zip(names, rows, strict=True)),
    )


def _read(db: sqlite3.Connection, table: str, keys: Keys) -> tuple[list[bytes], list[bytes]]:
    raw = keys.tobytes()
    every = [raw[i : i + KEY] for i in range(0, len(raw), KEY)]
    names: list[bytes] = []
    blobs: list[bytes] = []
    for i in range(0, len(every), AT_ONCE):
        some = every[i : i + AT_ONCE]
        marks = ",".join("?" * len(some))
        for name, blob in db.execute(
            f"SELECT pair, sides FROM {table} WHERE pair IN ({marks})", some
        ):
            names.append(name)
            blobs.append(blob)
    return names, blobs


@dataclass(eq=False)
class PairMargins:
    """Margins of pairs, as far as they are known.

    Attributes
    ----------
    margins : ndarray, shape (n_pairs,)
        Aggregated reward of the first side minus that of the second; NaN where unknown, or where
        too few members scored a side.
    members : ndarray of float32, shape (n_pairs, n_members)
        The same of each member: for T_mix, which needs no more digits. NaN where a member failed
        and the aggregator leaves it out.
    stored : ndarray of bool, shape (n_pairs,)
        Which were scored, well or not.
    """

    margins: Floats
    members: NDArray[np.float32]
    stored: NDArray[np.bool_]

    @property
    def failed(self) -> NDArray[np.bool_]:
        """Which lack a member's score: a failure, of a server perhaps, which is tried again."""
        return np.asarray(np.isnan(self.members).any(axis=1))

    def fill(self, places: NDArray[Any], sides: Floats, aggregator: Aggregator) -> None:
        """Enter the margins of pairs whose scores are there."""
        first, second = (aggregator.where_enough(sides[:, i]) for i in (0, 1))
        self.margins[places] = first - second
        self.stored[places] = True
        self.members[places] = sides[:, 0] - sides[:, 1]


def read_margins(
    table: ScoreTable,
    keys: Keys,
    aggregator: Aggregator,
    members: int,
    *,
    progress: Callable[[str, int, int], None],
) -> PairMargins:
    """Read stored scores as margins; members' scores pass through block by block.

    Parameters
    ----------
    table : ScoreTable
    keys : ndarray of S16, shape (n_pairs,)
        Sorted, each once.
    aggregator : Aggregator
    members : int
        How many there are.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    PairMargins
    """
    n = len(keys)
    found = PairMargins(
        np.full(n, np.nan), np.zeros((n, members), np.float32), np.zeros(n, dtype=np.bool_)
    )
    done = 0
    for places, sides in table.blocks(keys):
        if sides.shape[2] != members:
            raise StorageError(
                f"{table.path} holds scores of {sides.shape[2]} members, and the ensemble has "
                f"{members}; delete the file: it is computed anew"
            )
        found.fill(places, sides, aggregator)
        done += len(places)
        progress("reading scores", done, len(keys))
    return found
