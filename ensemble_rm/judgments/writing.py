"""Judgments into the tables: a transaction a batch, corrections after what they correct."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from ensemble_rm.errors import DataError, JudgmentConflictError, UnknownJudgmentError
from ensemble_rm.judgments import queries
from ensemble_rm.judgments.judgment import Judgment

T = TypeVar("T")
TRIES = 20
DEADLOCKS = {"40P01", "40001"}


@dataclass
class Written:
    """What became of a batch.

    Attributes
    ----------
    added, already : int
        Judgments that are new, and that were there.
    waiting : list of Judgment
        Corrections of what is not there, at least not yet.
    refused : list of (Judgment, DataError)
        Judgments that contradict a stored one.
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
        """Insert a batch in a transaction of its own.

        Parameters
        ----------
        batch : sequence of Judgment
        strict : bool
            Write nothing of the batch where one of it is refused.
        last : bool
            Refuse corrections of what is not there, instead of handing them back.

        Raises
        ------
        JudgmentConflictError, UnknownJudgmentError
            If `strict` is set and a judgment is refused.
        """
        for left in reversed(range(TRIES)):
            try:
                with self._connection.begin():
                    found = self._insert_all(batch)
                    if last:
                        found.refused += [(one, _unknown(one)) for one in found.waiting]
                        found.waiting = []
                    if strict and found.refused:
                        raise found.refused[0][1]
                    return found
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", None) not in DEADLOCKS or not left:
                    raise
                time.sleep(0.01)
        raise AssertionError("unreachable")

    def _insert_all(self, batch: Sequence[Judgment]) -> Written:
        found = Written(waiting=list(batch))
        while found.waiting:
            targets = {one.corrects for one in found.waiting if one.corrects is not None}
            there: set[str | None] = {None, *queries.existing(self._connection, targets)}
            ready = [one for one in found.waiting if one.corrects in there]
            if not ready:
                break
            self._insert(ready, found)
            found.waiting = [one for one in found.waiting if one.corrects not in there]
        return found

    def _insert(self, ready: Sequence[Judgment], found: Written) -> None:
        distinct = {one.id: one for one in ready}
        added = queries.insert(self._connection, distinct.values())
        found.added += added
        refused: list[Judgment] = []
        if added < len(distinct):
            stored = queries.existing(self._connection, distinct)
            refused = [one for one in ready if one.id not in stored]
            found.refused += zip(refused, self._reasons(refused), strict=True)
        found.already += len(ready) - added - len(refused)

    def _reasons(self, refused: Sequence[Judgment]) -> Iterator[DataError]:
        held = queries.holders(self._connection, refused)
        for one in refused:
            yield conflict(one, held.get((one.source, one.external_id))) or _corrected_twice(
                one, queries.correction_of(self._connection, one.corrects or "")
            )


def conflict(one: Judgment, holder: str | None) -> JudgmentConflictError | None:
    """Return the error of a judgment whose external id another one holds."""
    if holder in (None, one.id):
        return None
    return JudgmentConflictError(
        f"`external_id` {one.external_id!r} of source {one.source!r} is stored with other content "
        f"(id {holder}); if the verdict changed, add a correction with `corrects` and an external "
        "id of its own, else name another source"
    )


def _corrected_twice(one: Judgment, by: str | None) -> JudgmentConflictError:
    return JudgmentConflictError(
        f"`corrects` {one.corrects}: that judgment is corrected already, by {by}; correct that one"
    )


def _unknown(one: Judgment) -> UnknownJudgmentError:
    return UnknownJudgmentError(
        f"`corrects` {one.corrects}: no such judgment is stored; add it first, or mend the id"
    )


def in_batches(rows: Iterable[T], size: int) -> Iterator[tuple[list[T], bool]]:
    """Cut rows into lists of `size`, each with whether it is the last; one list at least."""
    held: list[T] = []
    for row in rows:
        if len(held) == size:
            yield held, False
            held = []
        held.append(row)
    yield held, True
