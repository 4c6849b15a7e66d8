"""JudgmentStore: human judgments in SQLite or PostgreSQL, append-only."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ensemble_rm.data.samples import Preferences
from ensemble_rm.errors import MissingExtraError
from ensemble_rm.judgments.filter import ALL_JUDGMENTS, JudgmentFilter
from ensemble_rm.judgments.judgment import Identity, Judgment, Verdict
from ensemble_rm.judgments.votes import to_preferences
from ensemble_rm.progress import Progress, silent

if TYPE_CHECKING:
    from sqlalchemy import Connection, Select

    from ensemble_rm.judgments.database.chain import Chain
    from ensemble_rm.judgments.database.engine import Database
    from ensemble_rm.judgments.database.erasing import ErasedRow
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
    judgment that refers to the old one. Batches form a hash chain, and whatever is read is compared
    with it and with its digest. Several processes may read and write at the same time; each opens
    the store itself.

    Parameters
    ----------
    database : Database
        Opened by `create` or `open`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._local = threading.local()  # a snapshot belongs to the thread that opened it

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
        return cls(open_database(place, create=True, read_only=False))

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
        StoreIntegrityError
            If triggers are missing that keep judgments from being changed.
        """
        return cls(open_database(place, create=False, read_only=read_only))

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
            If a correction names an unknown judgment, has another annotator, prompt or pair than
            the judgment that it corrects, or is dated before it.
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

        self._database.require_writable()
        engine = self._database.engine.execution_options(writer=True)
        with self._database.errors(), engine.connect() as connection:
            yield Writer(connection)

    def erase(
        self, ids: Collection[str], *, keep_shared: bool = False, dry_run: bool = False
    ) -> tuple[list[ErasedRow], int]:
        """Empty the texts of judgments, which are then no longer read; the chain stays valid.

        See `erase_judgments`, which also deletes what was derived from the texts.

        Parameters
        ----------
        ids : collection of str
        keep_shared : bool
            Keep texts that other judgments use; by default those judgments are erased too.
        dry_run : bool
            Write nothing.

        Returns
        -------
        rows : list of ErasedRow
            The judgments, with those that share a text.
        texts : int
            How many texts were emptied.

        Raises
        ------
        DataError
            If an id is not stored.
        StorageError
            If the store is read-only, or cannot be written.
        """
        from ensemble_rm.judgments.database import erasing

        ids = set(ids)
        if not dry_run:
            return erasing.erase(self._database, ids, keep_shared=keep_shared)
        with self._reading() as connection:
            rows, digests = erasing.rows_to_erase(
                connection, ids, keep_shared=keep_shared, store=self.name
            )
            return rows, len(digests - erasing.erased_texts(connection, digests))

    # Reading -----------------------------------------------------------------------------------

    @contextmanager
    def snapshot(self) -> Iterator[Chain]:
        """Read several things from one state of the store, whose chain is checked once.

        Without it, each method reads the newest state and checks the chain itself. The readings of
        other threads are not part of it.

        Yields
        ------
        Chain
            Of this state.

        Raises
        ------
        StoreIntegrityError
            If judgments are missing, were added past the library, or were changed by hand.
        """
        opened: tuple[Connection, Chain] | None = getattr(self._local, "snapshot", None)
        if opened is not None:
            yield opened[1]
            return
        from ensemble_rm.judgments.database.chain import check_chain

        with self._database.reading() as connection:
            chain = check_chain(connection, self.name)
            self._local.snapshot = connection, chain
            try:
                yield chain
            finally:
                self._local.snapshot = None

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """Yield the connection of the snapshot, or of a new state, with its chain checked."""
        from ensemble_rm.judgments.database.chain import check_chain

        opened: tuple[Connection, Chain] | None = getattr(self._local, "snapshot", None)
        if opened is not None:
            yield opened[0]
            return
        # Not a snapshot: a generator that stops early must not leave one open for other methods.
        with self._database.reading() as connection:
            check_chain(connection, self.name)
            yield connection

    def chain(self) -> Chain:
        """Return the chain of appended batches, compared with the stored judgments.

        Raises
        ------
        StoreIntegrityError
            See `snapshot`.
        """
        with self.snapshot() as chain:
            return chain

    def read(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Judgment]:
        """Stream judgments by time and id, a thousand in memory at a time.

        The stream sees one state of the store, regardless of concurrent writes. Erased judgments
        are not read.

        Parameters
        ----------
        where : JudgmentFilter
            Selection (default: all); corrected and retracted judgments, and retractions, are left
            out unless it includes them.

        Yields
        ------
        Judgment

        Raises
        ------
        StorageError
            If the store cannot be read.
        StoreIntegrityError
            If judgments are missing, or a row or a text was changed by hand.
        """
        from ensemble_rm.judgments.database import queries

        with (
            self._reading() as connection,
            queries.stream(connection, queries.whole(where)) as rows,
        ):
            for row in rows:
                yield queries.read_judgment(row, self.name)

    def find(self, ids: Collection[str]) -> dict[str, Judgment]:
        """Return the judgments with these ids that are stored and not erased, corrected ones too.

        Raises
        ------
        StoreIntegrityError
            As `read` does.
        """
        from ensemble_rm.judgments.database import queries

        found: dict[str, Judgment] = {}
        with self._reading() as connection:
            for query in queries.by_id(ids):
                for row in connection.execute(query):
                    judgment = queries.read_judgment(row, self.name)
                    found[judgment.id] = judgment
        return found

    def count(self, where: JudgmentFilter = ALL_JUDGMENTS) -> int:
        """Return the number of selected judgments."""
        from ensemble_rm.judgments.database import queries

        with self._reading() as connection:
            count: int = connection.execute(queries.counting(where)).scalar_one()
            return count

    def digest(self, where: JudgmentFilter = ALL_JUDGMENTS) -> str:
        """Return the SHA-256 of the sorted ids, which does not depend on the order of judgments.

        An id is a digest of a judgment's content, and is compared with it.
        """
        from ensemble_rm.judgments.database import queries

        digest = hashlib.sha256()
        with self._checked(queries.ids(where)) as rows:
            for row in rows:
                digest.update(row[0])
        return digest.hexdigest()

    def has_conversations(self, where: JudgmentFilter = ALL_JUDGMENTS) -> bool:
        """Return whether a selected judgment's prompt is a list of messages."""
        from ensemble_rm.judgments.database import queries

        with self._reading() as connection:
            return connection.execute(queries.conversations(where)).first() is not None

    def verdicts(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Verdict]:
        """Stream judgments without their texts, by time and id."""
        from ensemble_rm.judgments.database import queries

        with self._checked(queries.verdicts(where)) as rows:
            yield from map(queries.read_verdict, rows)

    def observations(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Observation]:
        """Stream judgments with times and without texts, for recalibration."""
        from ensemble_rm.judgments.database import queries

        with self._checked(queries.verdicts(where)) as rows:
            yield from map(queries.read_observation, rows)

    def newest(self, where: JudgmentFilter = ALL_JUDGMENTS) -> datetime | None:
        """Return the time of the newest selected judgment; None if none is selected."""
        from ensemble_rm.judgments.database import queries

        with self._checked(queries.newest(where)) as rows:
            for row in rows:
                return queries.read_time(row.judged_at)
        return None

    def verdicts_by_pair(self, where: JudgmentFilter = ALL_JUDGMENTS) -> Iterator[Verdict]:
        """Stream judgments without texts, by prompt, pair, time and id."""
        from ensemble_rm.judgments.database import queries

        with self._checked(queries.verdicts(where, by_pair=True)) as rows:
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
    def _checked(self, query: Select[Any]) -> Iterator[Iterator[Any]]:
        """Yield raw rows, each compared with its id."""
        from ensemble_rm.judgments.database import queries

        with (
            self._reading() as connection,
            queries.stream_checked(connection, query, self.name) as rows,
        ):
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

    def identities(self, ids: Collection[str]) -> dict[str, Identity]:
        """Return the identity of those of the ids that are stored; see `Identity`."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.identities(connection, ids)

    def erased_texts(self, judgments: Iterable[Judgment]) -> set[bytes]:
        """Return the digests of those of the judgments' texts that were erased."""
        from ensemble_rm.judgments.database import erasing

        digests = {digest for one in judgments for digest in one.text_digests}
        with self._database.reading() as connection:
            return erasing.erased_texts(connection, digests)

    def correction_links(self, ids: Collection[str]) -> dict[str, int]:
        """Return the batch of the correction of each of the ids, where there is one."""
        from ensemble_rm.judgments.database import writing

        with self._database.reading() as connection:
            return writing.correction_links(connection, ids)

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


def open_database(place: str | Path, **options: Any) -> Database:
    """Open the database of a store; options as in `Database`.

    Raises
    ------
    MissingExtraError, StorageError, StoreIntegrityError
        See `JudgmentStore.create` and `JudgmentStore.open`.
    """
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
