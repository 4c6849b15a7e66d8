"""JudgmentStore: human judgments in SQLite or PostgreSQL, append-only."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ensemble_rm.data.samples import Preferences
from ensemble_rm.errors import MissingExtraError, StorageError
from ensemble_rm.judgments.filter import ALL_JUDGMENTS, JudgmentFilter
from ensemble_rm.judgments.judgment import Judgment, Verdict
from ensemble_rm.judgments.votes import to_preferences
from ensemble_rm.progress import Progress, silent

if TYPE_CHECKING:
    from sqlalchemy import Select

    from ensemble_rm.judgments.database.engine import Database
    from ensemble_rm.judgments.database.queries import Observation
    from ensemble_rm.judgments.database.writing import Held, Writer

T = TypeVar("T")
BATCH = 5000


@dataclass(frozen=True, slots=True)
class Added:
    """The result of `JudgmentStore.add`.

    Attributes
    ----------
    added : int
        New judgments.
    already : int
        Judgments that were stored already, or given twice.
    """

    added: int
    already: int


class JudgmentStore:
    """An append-only database of human judgments; see `create` and `open`.

    Judgments are never updated or deleted, and the database refuses to: a correction is a new
    judgment that refers to the old one. Several processes may read and write at the same time; each
    opens the store itself.

    Parameters
    ----------
    database : Database
        Opened by `create` or `open`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def create(cls, place: str | Path) -> JudgmentStore:
        """Open a store for reading and writing; create it if there is none.

        Parameters
        ----------
        place : str or Path
            A file's path (SQLite), or ``postgresql://user@host/name``.

        Returns
        -------
        JudgmentStore

        Raises
        ------
        MissingExtraError
            If SQLAlchemy, Alembic or psycopg is not installed.
        StorageError
            If a newer library wrote the store.
            If the database cannot be opened.
        """
        return cls(_open(place, create=True, read_only=False))

    @classmethod
    def open(cls, place: str | Path, *, read_only: bool = False) -> JudgmentStore:
        """Open an existing store, and migrate its schema if it is old.

        Parameters
        ----------
        place : str or Path
            A file's path (SQLite), or ``postgresql://user@host/name``.
        read_only : bool
            Write nothing; implied if the file is not writable.

        Returns
        -------
        JudgmentStore

        Raises
        ------
        MissingExtraError, StorageError
            As `create` does; also if the store does not exist.
        """
        return cls(_open(place, create=False, read_only=read_only))

    def __enter__(self) -> JudgmentStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._database.engine.dispose()

    @property
    def name(self) -> str:
        """Path or URL of the store, without a password."""
        return self._database.name

    # Writing -----------------------------------------------------------------------------------

    def add(self, judgments: Iterable[Judgment], *, progress: Progress = silent) -> Added:
        """Append judgments, except those already stored.

        Each batch of 5,000 is one transaction. If a batch fails, the batches before it stay, and
        adding the same judgments again completes them.

        Parameters
        ----------
        judgments : iterable of Judgment
            Read lazily. A correction may come before what it corrects.
        progress : callable
            Called with (stage, done, total).

        Returns
        -------
        Added

        Raises
        ------
        JudgmentConflictError
            If an external id is stored with other content, or a judgment is corrected twice.
        DataError
            If a correction names an unknown judgment.
        StorageError
            If the store cannot be written.
        """
        added = already = done = 0
        # Corrections wait for their target, which may come in a later batch.
        waiting: list[Judgment] = []
        with self.writer() as writer:
            for batch, last in in_batches(judgments, BATCH):
                written = writer.put([*batch, *(waiting if last else ())], strict=True, last=last)
                waiting += written.waiting
                added += written.added
                already += written.already
                done += len(batch)
                progress("adding", done, 0)
        return Added(added, already)

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """Yield a writer of batches.

        Raises
        ------
        StorageError
            If the store is read-only, or cannot be written.
        """
        from ensemble_rm.judgments.database.writing import Writer

        if self._database.read_only:
            raise StorageError(f"{self.name} was opened read-only; open it for writing")
        engine = self._database.engine.execution_options(writer=True)
        with self._database.errors(), engine.connect() as connection:
            yield Writer(connection)

    # Reading -----------------------------------------------------------------------------------

    def read(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Judgment]:
        """Stream judgments by time and id, a thousand in memory at a time.

        The stream sees one state of the store, regardless of concurrent writes.

        Parameters
        ----------
        where : JudgmentFilter
            Selection (default: all); corrected judgments are left out unless it includes them.

        Yields
        ------
        Judgment

        Raises
        ------
        StorageError
            If the store cannot be read, or a row was changed by hand.
        """
        from ensemble_rm.judgments.database import queries

        with self._streaming(queries.whole(where)) as rows:
            for row in rows:
                yield queries.read_judgment(row, self.name)

    def count(self, where: JudgmentFilter = ALL_JUDGMENTS) -> int:
        """Return the number of selected judgments."""
        from ensemble_rm.judgments.database import queries

        with self._database.reading() as connection:
            found: int = connection.execute(queries.counting(where)).scalar_one()
            return found

    def digest(self, where: JudgmentFilter = ALL_JUDGMENTS) -> str:
        """Return the SHA-256 of the sorted ids, which does not depend on the order of judgments."""
        from ensemble_rm.judgments.database import queries

        found = hashlib.sha256()
        with self._streaming(queries.ids(where)) as rows:
            for row in rows:
                found.update(row.id)
        return found.hexdigest()

    def has_conversations(self, where: JudgmentFilter = ALL_JUDGMENTS) -> bool:
        """Return whether a selected judgment's prompt is a list of messages."""
        from ensemble_rm.judgments.database import queries

        with self._database.reading() as connection:
            return connection.execute(queries.conversations(where)).first() is not None

    def verdicts(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Verdict]:
        """Stream judgments without their texts, by time and id."""
        from ensemble_rm.judgments.database import queries

        with self._streaming(queries.verdicts(where)) as rows:
            yield from map(queries.read_verdict, rows)

    def observations(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Observation]:
        """Stream judgments with times and without texts, for recalibration."""
        from ensemble_rm.judgments.database import queries

        with self._streaming(queries.observations(where)) as rows:
            yield from map(queries.read_observation, rows)

    def newest(self, where: JudgmentFilter = ALL_JUDGMENTS) -> datetime | None:
        """Return the time of the newest selected judgment; None if none is selected."""
        from ensemble_rm.judgments.database import queries

        with self._database.reading() as connection:
            newest: datetime | None = connection.execute(queries.newest(where)).scalar()
            return newest

    def verdicts_by_pair(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Verdict]:
        """Stream judgments without texts, by prompt, pair, time and id."""
        from ensemble_rm.judgments.database import queries

        with self._streaming(queries.verdicts(where, by_pair=True)) as rows:
            yield from map(queries.read_verdict, rows)

    def preferences(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Preferences:
        """Combine the judgments of each pair into votes; see `to_preferences`.

        Parameters
        ----------
        where : JudgmentFilter
            Selection of judgments.

        Returns
        -------
        Preferences
            What `RewardEnsemble.calibrate` and `judge` take.
        """
        return to_preferences(self.read(where), source=self.name)

    @contextmanager
    def _streaming(self, query: Select[Any]) -> Iterator[Iterator[Any]]:
        from ensemble_rm.judgments.database import queries

        with self._database.reading() as connection, queries.stream(connection, query) as rows:
            yield rows

    def known(self, judgments: Iterable[Judgment]) -> dict[tuple[str, str], str]:
        """Return the stored id of each judgment's source and external id, where there is one."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.holders(connection, list(judgments))

    def held(self, judgments: Iterable[Judgment]) -> dict[tuple[str, str], Held]:
        """Return the stored judgment of each source and external id, with corrections applied."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.held(connection, list(judgments))

    def existing(self, ids: Collection[str]) -> set[str]:
        """Return those of the ids that are stored."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.existing(connection, ids)

    def corrections(self, ids: Collection[str]) -> dict[str, str]:
        """Return the id of the correction of each of the ids, where there is one."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.corrections(connection, ids)


def in_batches(rows: Iterable[T], size: int) -> Iterator[tuple[list[T], bool]]:
    """Split rows into lists of `size`, each with whether it is the last; at least one list."""
    batch: list[T] = []
    for row in rows:
        # A full batch is kept until the next row shows that it is not the last.
        if len(batch) == size:
            yield batch, False
            batch = []
        batch.append(row)
    yield batch, True


def _open(place: str | Path, **options: Any) -> Database:
    try:
        from ensemble_rm.judgments.database.engine import Database

        return Database(place, **options)
    except MissingExtraError:
        raise
    except ImportError as error:
        raise MissingExtraError(
            f"a judgment store needs SQLAlchemy and Alembic ({error}): "
            "pip install 'ensemble-rm[judgments]'"
        ) from error
