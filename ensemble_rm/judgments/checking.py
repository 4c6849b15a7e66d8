"""Check a whole store: triggers, chain, rows and texts; restore missing triggers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_rm.errors import StoreIntegrityError
from ensemble_rm.judgments.store import open_database
from ensemble_rm.progress import Progress, silent

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from ensemble_rm.judgments.database.engine import Database


@dataclass(frozen=True, kw_only=True)
class StoreCheck:
    """A store that passed every check.

    Attributes
    ----------
    store : str
        Its name.
    judgments, texts : int
        All judgments, corrected and erased ones included; distinct texts that are not erased.
    erased : int
        Judgments whose texts were erased.
    batches : int
        Links of the chain.
    head : str
        Its newest head, 64 hex digits.
    """

    store: str
    judgments: int
    texts: int
    erased: int
    batches: int
    head: str


def check_store(place: str | Path, *, progress: Progress = silent) -> StoreCheck:
    """Compare every judgment, every text and the chain of a store with their digests.

    Parameters
    ----------
    place : str or Path
        As in `JudgmentStore.open`.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    StoreCheck

    Raises
    ------
    StoreIntegrityError
        If triggers are missing, or judgments or texts were lost or changed.
    StorageError
        If there is no store, or it cannot be read.
    """
    database = open_database(place, create=False, read_only=True)
    try:
        with database.reading() as connection:
            return _check(database, connection, progress)
    finally:
        database.engine.dispose()


def repair_store(place: str | Path, *, progress: Progress = silent) -> StoreCheck:
    """Migrate a store, check it as `check_store` does, and restore missing triggers.

    Judgments are not repaired: a store that lost or changed some is refused.

    Parameters
    ----------
    place : str or Path
        As in `JudgmentStore.open`.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    StoreCheck

    Raises
    ------
    StoreIntegrityError, StorageError
        See `check_store`.
    """
    from ensemble_rm.judgments.database.chain import lock_for_appending
    from ensemble_rm.judgments.database.guards import install_guards

    database = open_database(place, create=False, read_only=False, repair=True)
    try:
        database.require_writable()
        # A writer's transaction: no row may change between the check and the triggers.
        engine = database.engine.execution_options(writer=True)
        with database.errors(), engine.connect() as connection, connection.begin():
            lock_for_appending(connection)
            checked = _check(database, connection, progress)
            install_guards(connection)
        return checked
    finally:
        database.engine.dispose()


def _check(database: Database, connection: Connection, progress: Progress) -> StoreCheck:
    from sqlalchemy import func, select

    from ensemble_rm.judgments.database.chain import check_chain
    from ensemble_rm.judgments.database.checking import RowChecker, raw_rows
    from ensemble_rm.judgments.database.queries import ROWS_AT_ONCE
    from ensemble_rm.judgments.database.tables import erasures

    chain = check_chain(connection, database.name)
    checker = RowChecker(connection, database.name)
    done, options = 0, {"yield_per": ROWS_AT_ONCE}
    with connection.execute(raw_rows(), execution_options=options) as result:
        for rows in result.partitions(ROWS_AT_ONCE):
            checker.check(rows)
            done += len(rows)
            progress("checking judgments", done, chain.judgments)
    return StoreCheck(
        store=database.name,
        judgments=done,
        texts=_check_texts(database, connection, progress),
        erased=connection.execute(select(func.count()).select_from(erasures)).scalar_one(),
        batches=len(chain.links),
        head=chain.head,
    )


def _check_texts(database: Database, connection: Connection, progress: Progress) -> int:
    """Return the number of texts, each compared with its digest; an erased one is empty."""
    from sqlalchemy import or_, select

    from ensemble_rm.judgments.database.queries import ROWS_AT_ONCE
    from ensemble_rm.judgments.database.tables import erasures, judgments, texts

    c, count = judgments.c, 0
    uses = or_(*(column == texts.c.digest for column in (c.prompt, c.first, c.second)))
    covered = select(c.id).join(erasures, erasures.c.judgment == c.id).where(uses).exists()
    lost = select(texts.c.digest).where(texts.c.body == "", ~covered).limit(1)
    changed: bytes | None = connection.execute(lost).scalar()
    query = select(texts.c.digest, texts.c.body).where(texts.c.body != "")
    with connection.execute(query, execution_options={"yield_per": ROWS_AT_ONCE}) as result:
        for digest, body in result:
            if hashlib.sha256(body.encode()).digest()[:16] != digest:
                changed = digest
                break
            count += 1
            if count % 10_000 == 0:
                progress("checking texts", count, 0)
    if changed is not None:
        raise StoreIntegrityError(
            f"{database.name}: the text {changed.hex()} was changed or emptied by hand; restore "
            "the store from a backup"
        )
    return count
