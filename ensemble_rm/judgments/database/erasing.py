"""Erase the texts of judgments: the rows, their digests and the chain stay."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from ensemble_rm.errors import DataError
from ensemble_rm.judgments.database.chain import append_link, lock_for_appending
from ensemble_rm.judgments.database.engine import Database
from ensemble_rm.judgments.database.queries import ROWS_AT_ONCE, read_time
from ensemble_rm.judgments.database.tables import erasures, judgments, texts


@dataclass(frozen=True)
class ErasedRow:
    """A judgment whose texts are erased.

    Attributes
    ----------
    id : str
    pair : bytes
        Digest of its pair, by which jobs keep scores.
    judged_at : datetime
    link : int
        Batch that appended it.
    asked : bool
        Whether it was named; otherwise it uses a text of one that was.
    """

    id: str
    pair: bytes
    judged_at: datetime
    link: int
    asked: bool


def rows_to_erase(
    connection: Connection, ids: Collection[str], *, keep_shared: bool, store: str
) -> tuple[list[ErasedRow], set[bytes]]:
    """Return the judgments to erase, and the digests of the texts to empty.

    Raises
    ------
    DataError
        If an id is not stored.
    """
    asked = {row.id: row for row in _rows(connection, judgments.c.id, map(bytes.fromhex, ids))}
    missing = sorted(set(ids) - {id_.hex() for id_ in asked})
    if missing:
        raise DataError(f"{store} has no judgment {', '.join(missing[:5])}; check the ids")
    wanted = {digest for row in asked.values() for digest in (row.prompt, row.first, row.second)}
    users: dict[bytes, Any] = {}
    for column in ("prompt", "first", "second"):
        users |= {row.id: row for row in _rows(connection, judgments.c[column], wanted)}
    if keep_shared:
        gone = _erased(connection, users)
        for id_, row in users.items():
            if id_ not in asked and id_ not in gone:
                wanted -= {row.prompt, row.first, row.second}
        users = asked
    rows = [
        ErasedRow(id_.hex(), row.pair_key, read_time(row.judged_at), row.link, id_ in asked)
        for id_, row in sorted(users.items())
    ]
    return rows, wanted


def erase(
    database: Database, ids: Collection[str], *, keep_shared: bool
) -> tuple[list[ErasedRow], int]:
    """Empty the texts of judgments in one transaction, and remove what the file keeps of them.

    Returns
    -------
    rows : list of ErasedRow
        The judgments that no reading returns any more.
    count : int
        Texts that were emptied.
    """
    database.require_writable()
    engine = database.engine.execution_options(writer=True)
    with database.errors(), engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        sqlite = connection.dialect.name == "sqlite"
        if sqlite:
            raw.execute("PRAGMA secure_delete=ON")  # overwrites freed bytes with zeros
        with connection.begin():
            number = lock_for_appending(connection)
            rows, digests = rows_to_erase(
                connection, ids, keep_shared=keep_shared, store=database.name
            )
            now = datetime.now(UTC)
            done = _erased(connection, (bytes.fromhex(row.id) for row in rows))
            new = [
                {"judgment": bytes.fromhex(row.id), "erased_at": now, "link": number}
                for row in rows
                if bytes.fromhex(row.id) not in done
            ]
            if new:
                connection.execute(insert(erasures), new)
            count = 0
            for part in _parts(digests):
                emptied = update(texts).where(texts.c.digest.in_(part), texts.c.body != "")
                count += connection.execute(emptied.values(body="")).rowcount
            append_link(connection, number, at=now)
        if sqlite:
            # Splits of pages leave copies in free space, and the log has the pages as they were.
            raw.execute("VACUUM")
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return rows, count


def erased_texts(connection: Connection, digests: Collection[bytes]) -> set[bytes]:
    """Return those of the texts that were erased."""
    if connection.execute(select(erasures.c.judgment).limit(1)).first() is None:
        return set()
    gone: set[bytes] = set()
    for part in _parts(digests):
        query = select(texts.c.digest).where(texts.c.digest.in_(part), texts.c.body == "")
        gone |= set(connection.execute(query).scalars())
    return gone


def _erased(connection: Connection, ids: Iterable[bytes]) -> set[bytes]:
    gone: set[bytes] = set()
    for part in _parts(ids):
        query = select(erasures.c.judgment).where(erasures.c.judgment.in_(part))
        gone |= set(connection.execute(query).scalars())
    return gone


def _rows(connection: Connection, column: Any, values: Iterable[bytes]) -> Iterator[Any]:
    c = judgments.c
    columns = (c.id, c.prompt, c.first, c.second, c.pair_key, c.judged_at, c.link)
    for part in _parts(values):
        yield from connection.execute(select(*columns).where(column.in_(part)))


def _parts(values: Iterable[bytes]) -> Iterator[list[bytes]]:
    ordered = sorted(values)
    return (ordered[i : i + ROWS_AT_ONCE] for i in range(0, len(ordered), ROWS_AT_ONCE))
