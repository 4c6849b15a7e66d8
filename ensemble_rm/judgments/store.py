"""JudgmentStore: every human verdict, appended and never changed, in SQLite or PostgreSQL."""

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
    """What `JudgmentStore.add` found.

    Attributes
    ----------
    added : int
        Judgments that are new.
    already : int
        Judgments that were there, or came twice.
    """

    added: int
    already: int


class JudgmentStore:
    """Human judgments in a database that only grows; see `create` and `open`.

    Nothing updates or deletes a judgment, and the database refuses to: a correction is a new
    judgment that names the old one. Several processes may read and write at once; each opens the
    store itself.

    Parameters
    ----------
    database : Database
        Opened by `create` or `open`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def create(cls, place: str | Path) -> JudgmentStore:
        """Open a store for reading and writing, and make it where there is none.

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
        """Open a store that exists; bring its schema up to date.

        Parameters
        ----------
        place : str or Path
            A file's path (SQLite), or ``postgresql://user@host/name``.
        read_only : bool
            Write nothing; so it is where the file cannot be written.

        Returns
        -------
        JudgmentStore

        Raises
        ------
        MissingExtraError, StorageError
            As `create` does; and where there is no store.
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
        """Give connections back."""
        self._database.engine.dispose()

    @property
    def name(self) -> str:
        """Where the store lies, without a password."""
        return self._database.name

    # Writing -----------------------------------------------------------------------------------

    def add(self, judgments: Iterable[Judgment], *, progress: Progress = silent) -> Added:
        """Append judgments; those that are there already are left alone.

        A transaction takes 5,000: up to that many are written all or not at all, of more, those
        before the failing batch stay, and adding the same again completes them.

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
            If a correction names a judgment that is nowhere.
        StorageError
            If the store cannot be written.
        """
        added = already = done = 0
        waiting: list[Judgment] = []
        with self.writer() as writer:
            for batch, last in in_batches(judgments, BATCH):
                found = writer.put([*batch, *(waiting if last else ())], strict=True, last=last)
                waiting += found.waiting
                added, already, done = (
                    added + found.added,
                    already + found.already,
                    done + len(batch),
                )
                progress("adding", done, 0)
        return Added(added, already)

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        """Give what writes batches, for as long as the context lasts.

        Raises
        ------
        StorageError
            If the store was opened for reading, or cannot be written.
        """
        from ensemble_rm.judgments.database.writing import Writer

        if self._database.read_only:
            raise StorageError(f"{self.name} is open for reading alone; open it for writing")
        engine = self._database.engine.execution_options(writer=True)
        with self._database.errors(), engine.connect() as connection:
            yield Writer(connection)

    # Reading -----------------------------------------------------------------------------------

    def read(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Judgment]:
        """Stream judgments by time and id, some thousand in memory at once.

        The stream sees one state of the store, whatever is added meanwhile.

        Parameters
        ----------
        where : JudgmentFilter
            Which; corrected ones are left out unless it says otherwise.

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
        """Return how many judgments are selected."""
        from ensemble_rm.judgments.database import queries

        with self._database.reading() as connection:
            found: int = connection.execute(queries.counting(where)).scalar_one()
            return found

    def digest(self, where: JudgmentFilter = ALL_JUDGMENTS) -> str:
        """Return the SHA-256 of the sorted ids: equal for equal judgments, however they came."""
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
        """Stream judgments as recalibration reads them: dated, and without their texts."""
        from ensemble_rm.judgments.database import queries

        with self._streaming(queries.observations(where)) as rows:
            yield from map(queries.read_observation, rows)

    def newest(self, where: JudgmentFilter = ALL_JUDGMENTS) -> datetime | None:
        """Return when the last selected judgment was given; None where none is selected."""
        from ensemble_rm.judgments.database import queries

        with self._database.reading() as connection:
            newest: datetime | None = connection.execute(queries.newest(where)).scalar()
            return newest

    def verdicts_by_pair(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Verdict]:
        """Stream judgments without their texts, by prompt and pair, in these by time and id."""
        from ensemble_rm.judgments.database import queries

        with self._streaming(queries.verdicts(where, by_pair=True)) as rows:
            yield from map(queries.read_verdict, rows)

    def preferences(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Preferences:
        """Join the judgments of each pair into votes; see `to_preferences`.

        Parameters
        ----------
        where : JudgmentFilter
            Which judgments count.

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
        """Return the id that holds each judgment's source and external id, where one does."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.holders(connection, list(judgments))

    def held(self, judgments: Iterable[Judgment]) -> dict[tuple[str, str], Held]:
        """Return what holds each judgment's source and external id now, corrections followed."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.held(connection, list(judgments))

    def existing(self, ids: Collection[str]) -> set[str]:
        """Return those of the ids that are stored."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.existing(connection, ids)

    def corrections(self, ids: Collection[str]) -> dict[str, str]:
        """Return the id of the judgment that corrects each of the ids, where one does."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.corrections(connection, ids)


def in_batches(rows: Iterable[T], size: int) -> Iterator[tuple[list[T], bool]]:
    """Cut rows into lists of `size`, each with whether it is the last; one list at least."""
    held: list[T] = []
    for row in rows:
        if len(held) == size:
            yield held, False
            held = []
        held.append(row)
    yield held, True


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
