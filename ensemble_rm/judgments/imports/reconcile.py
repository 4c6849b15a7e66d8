"""Reconcile an import with the store: a judgment is new, stored already, a correction or refused.

Works batch by batch, with or without writing. While a file is only checked, its judgments so far
are kept in a temporary database on disk, so that memory stays bounded.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from ensemble_rm.errors import DataError, RowProblem
from ensemble_rm.judgments.database.writing import (
    Held,
    Writer,
    content_of,
    corrected_twice,
    holds_another,
    unknown,
    with_erased_text,
    wrong_corrections,
)
from ensemble_rm.judgments.imports.formats import Imported
from ensemble_rm.judgments.judgment import Identity, Judgment

if TYPE_CHECKING:
    from ensemble_rm.judgments.store import JudgmentStore

Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A judgment of a file, its line, and when the verdict last changed, if known."""

    line: int
    judgment: Judgment
    revised_at: datetime | None

    @property
    def key(self) -> Key:
        """Source and external id, which identify it."""
        return self.judgment.source, self.judgment.external_id


class Reconciler:
    """Reconciles a file's judgments with the store, batch by batch, in the file's order.

    Parameters
    ----------
    store : JudgmentStore
    source : str
        The file's name, for problems.
    correct : bool
        Whether a changed verdict becomes a correction.
    writer : Writer, optional
        Without one, nothing is written.
    """

    def __init__(
        self, store: JudgmentStore, source: str, *, correct: bool, writer: Writer | None = None
    ) -> None:
        self._store, self._source = store, source
        self._correct, self._writer = correct, writer
        self._scratch = None if writer is not None else _Scratch()
        self._pending: list[Judgment] = []
        self._lines: dict[str, int] = {}  # lines of pending corrections
        self._corrected: dict[str, str] = {}  # old id → new id, in a check only

    def add(self, batch: Sequence[Entry], result: Imported) -> None:
        """Reconcile a batch, and count the outcomes in `result`."""
        held = self._store.held([entry.judgment for entry in batch])
        erased = with_erased_text(
            [entry.judgment for entry in batch],
            self._store.erased_texts(entry.judgment for entry in batch),
        )
        if self._scratch is not None:
            held |= self._scratch.held({entry.key for entry in batch})
        fresh: dict[Key, Judgment] = {}
        later: list[Judgment] = []
        named: list[Judgment] = []  # corrections that the file itself contains
        for entry in batch:
            old = held.get(entry.key)
            try:
                new = self._reconcile(entry, old)
                if new is not None and entry.judgment.id in erased:
                    raise erased[entry.judgment.id]
            except DataError as error:
                result.problems.append(RowProblem(self._source, entry.line, str(error)))
                continue
            if new is None:
                result.already += 1
                continue
            if new is not entry.judgment:
                result.corrections += 1
            elif new.corrects is not None:
                named.append(new)
            later.append(new)
            self._lines[new.id] = entry.line
            first = new.id if old is None else old.first
            # A later row of the same batch with this key must find this one.
            held[entry.key] = Held(first, new.id, content_of(new), new.identity)
            fresh[entry.key] = new
        if self._scratch is None:
            self._write(later, result, last=False)
        else:
            self._scratch.keep({key: held[key] for key in fresh}, later)
            result.added += len(later)
            self._check(named, result)

    def finish(self, result: Imported) -> None:
        """Reconcile corrections whose target was not in the file before them."""
        if self._scratch is None:
            self._write([], result, last=True)
            return
        # A check writes nothing, so targets from the file itself are only in the scratch database.
        targets = self._scratch.identities({one.corrects or "" for one in self._pending})
        self._scratch.close()
        wrong = wrong_corrections(self._pending, targets)
        wrong |= {one.id: unknown(one) for one in self._pending if one.corrects not in targets}
        self._refuse_checked(self._pending, wrong, result)

    def _reconcile(self, entry: Entry, old: Held | None) -> Judgment | None:
        """Return the judgment to add for an entry; None where it is stored already."""
        judgment, revised = entry.judgment, entry.revised_at
        if old is None:
            return judgment
        if revised is None:
            if judgment.id != old.first:
                raise holds_another(judgment, old.first)
            return None
        if old.content == content_of(judgment):
            return None
        if old.first != old.latest and revised <= old.identity.judged_at:
            return None  # an older state of a verdict that has been corrected since
        if not self._correct:
            raise holds_another(judgment, old.first)
        # The time makes the id unique per revision, and the same at a repeated import.
        name = f"{judgment.external_id}@{revised.isoformat()}"
        new = replace(judgment, external_id=name, judged_at=revised, corrects=old.latest)
        # Here, because the store does not contain the target yet if this file adds it.
        for error in wrong_corrections([new], {old.latest: old.identity}).values():
            raise error
        return new

    def _write(self, fresh: list[Judgment], result: Imported, *, last: bool) -> None:
        assert self._writer is not None
        batch = [*fresh, *self._pending] if last else fresh
        written = self._writer.put(batch, strict=False, last=last)
        result.added += written.added
        result.already += written.already
        for one, error in written.refused:
            self._refuse(one, error, result)
        self._pending += written.waiting
        self._lines = {one.id: self._lines[one.id] for one in self._pending}

    def _check(self, corrections: list[Judgment], result: Imported) -> None:
        """Find what writing would refuse: second and wrong corrections, and those of nothing."""
        ids = {one.corrects or "" for one in corrections}
        by = self._store.corrections(ids) | self._corrected
        targets = self._store.identities(ids)
        wrong = wrong_corrections(corrections, targets)
        for one in corrections:
            old = one.corrects or ""
            if by.setdefault(old, one.id) != one.id:
                wrong[one.id] = corrected_twice(one, by[old])
            self._corrected[old] = by[old]
        self._refuse_checked(corrections, wrong, result)
        self._pending += [one for one in corrections if one.corrects not in targets]
        self._lines = {one.id: self._lines[one.id] for one in self._pending}

    def _refuse_checked(
        self, rows: Sequence[Judgment], wrong: Mapping[str, DataError], result: Imported
    ) -> None:
        for one in rows:
            if one.id in wrong:
                self._refuse(one, wrong[one.id], result)
                result.added -= 1  # counted when its row was read

    def _refuse(self, one: Judgment, error: DataError, result: Imported) -> None:
        result.problems.append(RowProblem(self._source, self._lines[one.id], str(error)))


class _Scratch:
    """The judgments of a file so far, in an anonymous temporary SQLite database on disk."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        # Temporary data: nothing has to be recovered after a crash.
        self._database.execute("PRAGMA journal_mode=OFF")
        identity = "annotator TEXT, prompt BLOB, pair BLOB, judged_at TEXT"
        self._database.execute(
            "CREATE TABLE held (key BLOB PRIMARY KEY, first TEXT, latest TEXT, content BLOB, "
            f"{identity}) WITHOUT ROWID"
        )
        self._database.execute(
            f"CREATE TABLE identities (id TEXT PRIMARY KEY, {identity}) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Delete the database."""
        self._database.close()

    def keep(self, held: Mapping[Key, Held], added: Iterable[Judgment]) -> None:
        """Store the current holder of each key, and the identity of each new judgment."""
        self._database.execute("BEGIN")
        self._database.executemany(
            "INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(_name(key), *one[:3], *_to_row(one.identity)) for key, one in held.items()],
        )
        self._database.executemany(
            "INSERT OR REPLACE INTO identities VALUES (?, ?, ?, ?, ?)",
            [(one.id, *_to_row(one.identity)) for one in added],
        )
        self._database.execute("COMMIT")

    def held(self, keys: Iterable[Key]) -> dict[Key, Held]:
        """Return the holder of each key, where there is one."""
        holders = {}
        query = "SELECT * FROM held WHERE key = ?"
        for key in keys:
            row = self._database.execute(query, (_name(key),)).fetchone()
            if row is not None:
                first, latest, content = row[1:4]
                holders[key] = Held(first, latest, content, _from_row(row[4:]))
        return holders

    def identities(self, ids: Iterable[str]) -> dict[str, Identity]:
        """Return the identity of those of the ids that are in the file."""
        stored = {}
        for id_ in ids:
            query = "SELECT * FROM identities WHERE id = ?"
            row = self._database.execute(query, (id_,)).fetchone()
            if row is not None:
                stored[id_] = _from_row(row[1:])
        return stored


def _to_row(identity: Identity) -> tuple[object, ...]:
    return (*identity[:3], identity.judged_at.isoformat())


def _from_row(row: Sequence[Any]) -> Identity:
    annotator, prompt, pair, judged_at = row
    return Identity(annotator, prompt, pair, datetime.fromisoformat(judged_at))


def _name(key: Key) -> bytes:
    """Return 16 bytes that identify a source and an external id, neither of which contains NUL."""
    return hashlib.sha256("\0".join(key).encode()).digest()[:16]
