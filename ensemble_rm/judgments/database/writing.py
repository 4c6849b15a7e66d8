"""Judgments into the tables: a transaction a batch, corrections after what they correct."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from ensemble_rm.errors import DataError, JudgmentConflictError
from ensemble_rm.judgments.database import queries
from ensemble_rm.judgments.judgment import Judgment

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
        JudgmentConflictError, DataError
            If `strict` is set and a judgment is refused.
        """
        for left in reversed(range(TRIES)):
            try:
                with self._connection.begin():
                    found = self._insert_all(batch)
                    if last:
                        found.refused += [(one, unknown(one)) for one in found.waiting]
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
            ready, rest = _next_round(found.waiting, there)
            if not ready:
                break
            self._insert(ready, found)
            found.waiting = rest
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
            holder = held.get((one.source, one.external_id), one.id)
            if holder != one.id:
                yield holds_another(one, holder)
            else:
                by = queries.corrections(self._connection, {one.corrects or ""})
                yield corrected_twice(one, by.get(one.corrects or "", "another"))


def _next_round(
    waiting: Sequence[Judgment], there: set[str | None]
) -> tuple[list[Judgment], list[Judgment]]:
    """Split off those whose target is there; of rivals for one target the first alone."""
    ready: list[Judgment] = []
    rest: list[Judgment] = []
    taken: set[str] = set()
    for one in waiting:
        free = one.corrects is None or one.corrects not in taken
        (ready if free and one.corrects in there else rest).append(one)
        if one.corrects is not None:
            taken.add(one.corrects)
    return ready, rest


def holds_another(one: Judgment, holder: str) -> JudgmentConflictError:
    """Return the error of a judgment whose external id another one holds."""
    return JudgmentConflictError(
        f"`external_id` {one.external_id!r} of source {one.source!r} is stored with other content "
        f"(id {holder}); if the verdict changed, add a correction with `corrects` and an external "
        "id of its own, else name another source"
    )


def corrected_twice(one: Judgment, by: str) -> JudgmentConflictError:
    """Return the error of a second correction."""
    return JudgmentConflictError(
        f"`corrects` {one.corrects}: that judgment is corrected already, by {by}; correct that one"
    )


def unknown(one: Judgment) -> DataError:
    """Return the error of a correction whose target is nowhere."""
    return DataError(
        f"`corrects` {one.corrects}: no such judgment is stored; add it first, or mend the id"
    )
