"""The hash chain of appended batches, which shows that no judgment was lost, moved or slipped in.

Each transaction that appends judgments or erasures adds a link. A link's digest covers the id, the
time and the corrected id of each of its judgments; its head covers that digest and the head before
it. An id is itself a digest of the judgment's content, so that the newest head stands for the whole
store. Texts are covered by their digests, so that the chain survives their erasure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, insert, select, text

from ensemble_rm.errors import StoreIntegrityError
from ensemble_rm.judgments.database.tables import chain

WRITER_LOCK = 0x636861696E  # of PostgreSQL's advisory locks
NO_HEAD = bytes(32)  # before the first link


class Link(NamedTuple):
    """One batch of the chain.

    Attributes
    ----------
    number : int
        From 1.
    judgments, erasures : int
        How many it added.
    digest : bytes
        SHA-256 of them.
    head : bytes
        SHA-256 of the digest, the counts, the time and the head before.
    appended_at : datetime, optional
        When it was appended; None for judgments that were stored before there was a chain.
    """

    number: int
    judgments: int
    erasures: int
    digest: bytes
    head: bytes
    appended_at: datetime | None


@dataclass(frozen=True)
class Chain:
    """The checked chain of a store.

    Attributes
    ----------
    links : tuple of Link
    """

    links: tuple[Link, ...] = ()
    _heads: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        heads = frozenset({NO_HEAD.hex(), *(link.head.hex() for link in self.links)})
        object.__setattr__(self, "_heads", heads)

    @property
    def head(self) -> str:
        """Head of the newest link, 64 hex digits; zeros for an empty store."""
        return self.links[-1].head.hex() if self.links else NO_HEAD.hex()

    @property
    def judgments(self) -> int:
        """Number of stored judgments, corrected and erased ones included."""
        return sum(link.judgments for link in self.links)

    def has_head(self, head: str) -> bool:
        """Return whether the store once had this head, or has it now."""
        return head in self._heads


# Writing -----------------------------------------------------------------------------------------


def lock_for_appending(connection: Connection) -> int:
    """Make writers take turns until the transaction ends; return the number of the next link."""
    # SQLite's BEGIN IMMEDIATE has locked the file already.
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITER_LOCK})
    number: int | None = connection.execute(select(func.max(chain.c.number))).scalar()
    return (number or 0) + 1


def append_link(connection: Connection, number: int, *, at: datetime | None) -> None:
    """Add the link of the judgments and erasures that the transaction wrote with its number."""
    parts = [_digests(connection, table, link=number).get(number, NOTHING) for table in _LINES]
    judgments_, erasures_ = parts
    if not judgments_.rows + erasures_.rows:
        return
    before = connection.execute(select(chain.c.head).where(chain.c.number == number - 1)).scalar()
    link = Link(number, judgments_.rows, erasures_.rows, _join(parts), NO_HEAD, at)
    link = link._replace(head=_next_head(before or NO_HEAD, link))
    connection.execute(insert(chain), [link._asdict()])


# Checking ----------------------------------------------------------------------------------------


def check_chain(connection: Connection, store: str) -> Chain:
    """Compare all stored judgments and erasures with the chain.

    Costs about half a second per million judgments: it reads an index, without texts and labels.

    Raises
    ------
    StoreIntegrityError
        If a judgment is missing, was added past the library, or has another time or another
        corrected judgment; or if the chain itself was changed.
    """
    links = tuple(
        Link(*row) for row in connection.execute(select(*chain.c).order_by(chain.c.number))
    )
    before = NO_HEAD
    for number, link in enumerate(links, start=1):
        if link.number != number or link.head != _next_head(before, link):
            raise StoreIntegrityError(
                f"{store}: the chain of batches was changed at number {number}; {RESTORE}"
            )
        before = link.head
    stored = {table: _digests(connection, table) for table in _LINES}
    for link in links:
        parts = [stored[table].pop(link.number, NOTHING) for table in _LINES]
        if _join(parts) != link.digest:
            raise _changed(store, link, parts)
    for table, rest in stored.items():
        for number, part in rest.items():
            raise StoreIntegrityError(
                f"{store}: {part.rows} {table} of batch {number} are not in the chain: they were "
                f"not written by this library, or links were removed; {RESTORE}"
            )
    return Chain(links)


RESTORE = "restore the store from a backup"


class _Part(NamedTuple):
    rows: int
    digest: bytes


NOTHING = _Part(0, hashlib.sha256().digest())


def _changed(store: str, link: Link, parts: list[_Part]) -> StoreIntegrityError:
    when = "" if link.appended_at is None else f", appended {link.appended_at.isoformat()}"
    batch = f"batch {link.number}{when}"
    for what, part, rows in zip(_LINES, parts, link[1:3], strict=True):
        if part.rows != rows:
            return StoreIntegrityError(
                f"{store}: {batch}, had {rows} {what} and has {part.rows} now; {RESTORE}"
            )
    return StoreIntegrityError(
        f"{store}: {batch}: an id, a time or a corrected id was changed by hand; {RESTORE}"
    )


def _join(parts: list[_Part]) -> bytes:
    return hashlib.sha256(b"".join(part.digest for part in parts)).digest()


def _next_head(before: bytes, link: Link) -> bytes:
    at = "" if link.appended_at is None else link.appended_at.astimezone(UTC).isoformat()
    counts = f"{link.number}:{link.judgments}:{link.erasures}:{at}"
    return hashlib.sha256(before + link.digest + counts.encode()).digest()


# One row as text, with fields of fixed width, so that two different batches never read the same.
# SQLite stores a time as this text; HEX of NULL is empty there.
_TIME = """to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US') || '+00:00'"""
_LINES = {
    "judgments": {
        "sqlite": "hex(id) || judged_at || hex(corrects)",
        "postgresql": "upper(encode(id, 'hex')) || " + _TIME.format("judged_at") + " || "
        "coalesce(upper(encode(corrects, 'hex')), '')",
    },
    "erasures": {
        "sqlite": "hex(judgment) || erased_at",
        "postgresql": "upper(encode(judgment, 'hex')) || " + _TIME.format("erased_at"),
    },
}
_TABLES = {"judgments": ("judgments", "id"), "erasures": ("judgment_erasures", "judgment")}


def _digests(connection: Connection, what: str, *, link: int | None = None) -> dict[int, _Part]:
    """Return number and digest of the rows of each link, or of one."""
    name = connection.dialect.name
    (table, key), line = _TABLES[what], _LINES[what][name]
    where = "" if link is None else f" WHERE link = {link:d}"
    if name == "postgresql":  # on the server, so that a digest per batch crosses the network
        rows = connection.exec_driver_sql(
            f"SELECT link, count(*), sha256(string_agg(convert_to({line}, 'UTF8'), ''::bytea "
            f"ORDER BY {key})) FROM {table}{where} GROUP BY link"
        )
        return {number: _Part(count, bytes(digest)) for number, count, digest in rows}
    # SQLite has no SHA-256. The driver's own cursor, since a Row object per judgment takes as long.
    raw: Any = connection.connection.dbapi_connection
    cursor = raw.execute(f"SELECT link, {line} FROM {table}{where} ORDER BY link, {key}")
    parts: dict[int, _Part] = {}
    for number, group in groupby(cursor, itemgetter(0)):
        lines = [text_ for _, text_ in group]
        parts[number] = _Part(len(lines), hashlib.sha256("".join(lines).encode()).digest())
    return parts
