"""Write judgments: one transaction per batch, corrections after the judgments they correct."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from ensemble_rm.errors import DataError, JudgmentConflictError
from ensemble_rm.judgments.database.chain import append_link, lock_for_appending
from ensemble_rm.judgments.database.erasing import erased_texts
from ensemble_rm.judgments.database.queries import COLUMNS, ROWS_AT_ONCE
from ensemble_rm.judgments.database.tables import judgments, texts
from ensemble_rm.judgments.judgment import (
    Identity,
    Judgment,
    changed_identity,
    digest,
    text_body,
)

TRIES = 20
DEADLOCKS = {"40P01", "40001"}  # PostgreSQL: deadlock detected, serialization failure
IDENTITY = tuple(judgments.c[n] for n in ("annotator", "prompt_key", "pair_key", "judged_at"))
CONTENT = ("outcome", "annotator", "batch", "policy", "subset", "strategy", "inclusion")


@dataclass
class Written:
    """The result of writing a batch.

    Attributes
    ----------
    added, already : int
        Numbers of new judgments, and of those stored already.
    waiting : list of Judgment
        Corrections of judgments that are not stored yet.
    refused : list of (Judgment, DataError)
        Judgments that conflict with a stored one.
    """

    added: int = 0
    already: int = 0
    waiting: list[Judgment] = field(default_factory=list)
    refused: list[tuple[Judgment, DataError]] = field(default_factory=list)


class Writer:
    """Writes batches through one connection, which locks the store at the start of each.

    Parameters
    ----------
    connection : Connection
        Of an engine with ``writer=True``.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def put(self, batch: Sequence[Judgment], *, strict: bool, last: bool) -> Written:
        """Insert a batch in its own transaction.

        Parameters
        ----------
        batch : sequence of Judgment
        strict : bool
            Write nothing of the batch if a judgment is refused.
        last : bool
            Refuse corrections of judgments that are not stored, instead of returning them.

        Raises
        ------
        JudgmentConflictError, DataError
            If `strict` is set and a judgment is refused.
        """
        for left in reversed(range(TRIES)):
            try:
                with self._connection.begin():
                    number = lock_for_appending(self._connection)
                    written = self._insert_all(batch, number)
                    if last:
                        written.refused += [(one, unknown(one)) for one in written.waiting]
                        written.waiting = []
                    if strict and written.refused:
                        raise written.refused[0][1]
                    append_link(self._connection, number, at=datetime.now(UTC))
                    return written
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", None) not in DEADLOCKS or not left:
                    raise
                time.sleep(0.01)  # a deadlock with another writer resolves on a retry
        raise AssertionError("unreachable")

    def _insert_all(self, batch: Sequence[Judgment], link: int) -> Written:
        written = Written(waiting=list(batch))
        while written.waiting:
            # In rounds: a batch may correct judgments that it inserts itself, in any order.
            targets = {one.corrects for one in written.waiting if one.corrects is not None}
            stored: set[str | None] = {None, *existing(self._connection, targets)}
            ready, rest = _next_round(written.waiting, stored)
            if not ready:
                break
            self._insert(self._valid(ready, written), written, link)
            written.waiting = rest
        return written

    def _valid(self, ready: Sequence[Judgment], written: Written) -> list[Judgment]:
        """Refuse corrections that change what they correct, and texts that were erased."""
        targets = {one.corrects for one in ready if one.corrects is not None}
        wrong = wrong_corrections(ready, identities(self._connection, targets))
        digests = {digest for one in ready for digest in one.text_digests}
        wrong |= with_erased_text(ready, erased_texts(self._connection, digests))
        # Stored before the erasure, or by an earlier release: adding it again is no change.
        for id_ in existing(self._connection, wrong):
            del wrong[id_]
        written.refused += [(one, wrong[one.id]) for one in ready if one.id in wrong]
        return [one for one in ready if one.id not in wrong]

    def _insert(self, ready: Sequence[Judgment], written: Written, link: int) -> None:
        distinct = {judgment.id: judgment for judgment in ready}
        added = insert(self._connection, distinct.values(), link)
        written.added += added
        refused: list[Judgment] = []
        if added < len(distinct):
            # Fewer rows than judgments: some were stored already, the others conflict.
            stored = existing(self._connection, distinct)
            refused = [one for one in ready if one.id not in stored]
            written.refused += zip(refused, self._reasons(refused), strict=True)
        written.already += len(ready) - added - len(refused)

    def _reasons(self, refused: Sequence[Judgment]) -> Iterator[DataError]:
        by_key = holders(self._connection, refused)
        for judgment in refused:
            holder = by_key.get((judgment.source, judgment.external_id), judgment.id)
            if holder != judgment.id:
                yield holds_another(judgment, holder)
            else:
                old = judgment.corrects or ""
                by = corrections(self._connection, {old}).get(old, "another")
                yield corrected_twice(judgment, by)


def _next_round(
    waiting: Sequence[Judgment], stored: set[str | None]
) -> tuple[list[Judgment], list[Judgment]]:
    """Split off those whose target is stored; of several for one target, only the first."""
    ready: list[Judgment] = []
    rest: list[Judgment] = []
    taken: set[str] = set()
    for judgment in waiting:
        target = judgment.corrects
        free = target is None or target not in taken
        (ready if free and target in stored else rest).append(judgment)
        if target is not None:
            taken.add(target)
    return ready, rest


def holds_another(one: Judgment, holder: str) -> JudgmentConflictError:
    """Return the error of a judgment whose external id belongs to another judgment."""
    return JudgmentConflictError(
        f"`external_id` {one.external_id!r} of source {one.source!r} is stored with other content "
        f"(id {holder}); if the verdict changed, add a correction with `corrects` and another "
        "external id, otherwise use another source"
    )


def corrected_twice(one: Judgment, by: str) -> JudgmentConflictError:
    """Return the error of a second correction."""
    return JudgmentConflictError(
        f"`corrects` {one.corrects}: that judgment already has a correction, {by}; correct that one"
    )


def wrong_corrections(
    rows: Iterable[Judgment], targets: Mapping[str, Identity]
) -> dict[str, DataError]:
    """Return the error of each correction that changes what it corrects, by its id.

    Parameters
    ----------
    rows : iterable of Judgment
    targets : mapping of str to Identity
        Of judgments that are corrected, by id.
    """
    wrong: dict[str, DataError] = {}
    for one in rows:
        target = targets.get(one.corrects or "")
        problem = None if target is None else changed_identity(one.identity, target)
        if problem is not None:
            wrong[one.id] = DataError(f"`corrects` {one.corrects}: {problem}")
    return wrong


def with_erased_text(rows: Iterable[Judgment], erased: Collection[bytes]) -> dict[str, DataError]:
    """Return the error of each judgment that uses an erased text, by its id."""
    return {
        one.id: DataError("the prompt or a completion was erased from the store; leave the row out")
        for one in rows
        if not set(erased).isdisjoint(one.text_digests)
    }


def unknown(one: Judgment) -> DataError:
    """Return the error of a correction whose target does not exist."""
    return DataError(
        f"`corrects` {one.corrects}: no such judgment is stored; add it first, or fix the id"
    )


# Statements -------------------------------------------------------------------------------------


class Held(NamedTuple):
    """The judgment stored under an external id.

    Attributes
    ----------
    first, latest : str
        Id of the judgment with the external id, and of its latest correction.
    content : bytes
        `content_of` the latest.
    identity : Identity
        Of the latest.
    """

    first: str
    latest: str
    content: bytes
    identity: Identity


def content_of(judgment: Judgment) -> bytes:
    """Return a digest of a judgment without its time, its external id and what it corrects."""
    return _content(judgment.text_digests, [getattr(judgment, name) for name in CONTENT])


def _content(texts_: Sequence[bytes], values: Sequence[object]) -> bytes:
    return digest([part.hex() for part in texts_], list(values))


def insert(connection: Connection, rows: Collection[Judgment], link: int) -> int:
    """Insert judgments and their texts, except those already stored; return how many are new.

    `link` is the number of their batch in the chain.

    All writers insert rows in the same order, so that two of them do not deadlock.
    """
    if not rows:
        return 0
    upsert: Any = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    bodies: dict[bytes, Any] = {}
    for row in rows:
        bodies.update(zip(row.text_digests, (row.prompt, row.first, row.second), strict=True))
    connection.execute(
        upsert(texts).on_conflict_do_nothing(),
        [{"digest": key, "body": text_body(bodies[key])} for key in sorted(bodies)],
    )
    ordered = sorted(rows, key=lambda one: (one.source, one.external_id))
    # Count the returned ids: drivers disagree about the row count of a multi-row insert.
    new = upsert(judgments).on_conflict_do_nothing().returning(judgments.c.id)
    return len(connection.execute(new, [_columns(one) | {"link": link} for one in ordered]).all())


def _columns(judgment: Judgment) -> dict[str, Any]:
    prompt, first, second = judgment.text_digests
    row = {name: getattr(judgment, name) for name in COLUMNS}
    row |= {"id": bytes.fromhex(judgment.id), "prompt": prompt, "first": first, "second": second}
    row |= {"prompt_key": judgment.prompt_digest, "pair_key": judgment.pair_digest}
    return row | {"corrects": judgment.corrects and bytes.fromhex(judgment.corrects)}


def existing(connection: Connection, ids: Collection[str]) -> set[str]:
    """Return those of `ids` that are stored."""
    stored: set[str] = set()
    for part in _parts(ids):
        query = select(judgments.c.id).where(judgments.c.id.in_([bytes.fromhex(i) for i in part]))
        stored |= {row.id.hex() for row in connection.execute(query)}
    return stored


def holders(connection: Connection, rows: Collection[Judgment]) -> dict[tuple[str, str], str]:
    """Return the stored id of each judgment's source and external id, where there is one."""
    stored: dict[tuple[str, str], str] = {}
    by_source: dict[str, set[str]] = {}
    for judgment in rows:
        by_source.setdefault(judgment.source, set()).add(judgment.external_id)
    for source, external_ids in by_source.items():
        # In parts, because `ROWS_AT_ONCE` bounds an IN clause.
        for part in _parts(external_ids):
            query = select(judgments.c.external_id, judgments.c.id).where(
                judgments.c.source == source, judgments.c.external_id.in_(part)
            )
            for row in connection.execute(query):
                stored[source, row.external_id] = row.id.hex()
    return stored


def corrections(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """Return the id of the correction of each of `ids`, where there is one."""
    correction_of: dict[str, str] = {}
    c = judgments.c
    for part in _parts(ids):
        query = select(c.corrects, c.id).where(c.corrects.in_([bytes.fromhex(i) for i in part]))
        for row in connection.execute(query):
            correction_of[row.corrects.hex()] = row.id.hex()
    return correction_of


def correction_links(connection: Connection, ids: Collection[str]) -> dict[str, int]:
    """Return the batch of the correction of each of `ids`, where there is one."""
    links: dict[str, int] = {}
    c = judgments.c
    for part in _parts(ids):
        query = select(c.corrects, c.link).where(c.corrects.in_([bytes.fromhex(i) for i in part]))
        links |= {row.corrects.hex(): row.link for row in connection.execute(query)}
    return links


def latest(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """Return the end of each judgment's chain of corrections; itself without corrections."""
    end_of = {id_: id_ for id_ in ids}
    ends = set(ids)
    while newer := corrections(connection, ends):
        end_of = {id_: newer.get(end, end) for id_, end in end_of.items()}
        ends = set(newer.values())
    return end_of


def held(connection: Connection, rows: Collection[Judgment]) -> dict[tuple[str, str], Held]:
    """Return the stored judgment of each source and external id, where there is one."""
    first_of = holders(connection, rows)
    end_of = latest(connection, set(first_of.values()))
    contents: dict[str, tuple[bytes, Identity]] = {}
    c = judgments.c
    columns = (c.prompt, c.first, c.second, *(c[name] for name in CONTENT))
    for part in _parts(set(end_of.values())):
        query = select(c.id, *IDENTITY, *columns).where(c.id.in_([bytes.fromhex(i) for i in part]))
        for row in connection.execute(query):
            id_, identity, rest = row[0], Identity(*row[1:5]), row[5:]
            contents[id_.hex()] = (_content(rest[:3], rest[3:]), identity)
    return {
        key: Held(first, end_of[first], *contents[end_of[first]]) for key, first in first_of.items()
    }


def identities(connection: Connection, ids: Collection[str]) -> dict[str, Identity]:
    """Return the identity of those of `ids` that are stored."""
    stored: dict[str, Identity] = {}
    for part in _parts(ids):
        query = select(judgments.c.id, *IDENTITY).where(
            judgments.c.id.in_([bytes.fromhex(i) for i in part])
        )
        for row in connection.execute(query):
            stored[row[0].hex()] = Identity(*row[1:])
    return stored


def _parts(values: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(values)
    return (ordered[i : i + ROWS_AT_ONCE] for i in range(0, len(ordered), ROWS_AT_ONCE))
