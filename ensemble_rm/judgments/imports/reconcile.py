"""What becomes of each judgment of an import: new, there already, a correction, or refused.

Works batch by batch, with or without writing; what a file that is only checked has held so far is
kept in a scratch database on disk, so that memory stays flat. Knows nothing of files' formats.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, TypeAlias

from ensemble_rm.errors import DataError, RowProblem
from ensemble_rm.judgments.database.queries import Held, content_of
from ensemble_rm.judgments.database.writing import Writer, corrected_twice, holds_another, unknown
from ensemble_rm.judgments.imports.rows import Imported
from ensemble_rm.judgments.judgment import Judgment

if TYPE_CHECKING:
    from ensemble_rm.judgments.store import JudgmentStore

Key: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A judgment of a file: its line, and when the verdict last changed, where that is known."""

    line: int
    judgment: Judgment
    revised_at: datetime | None

    @property
    def key(self) -> Key:
        """What names it."""
        return self.judgment.source, self.judgment.external_id


class Settler:
    """Settles batches of a file's judgments, in the order of the file.

    Parameters
    ----------
    store : JudgmentStore
    source : str
        The file, for problems.
    correct : bool
        Whether a changed verdict becomes a correction.
    writer : Writer, optional
        What writes; nothing is written without one.
    """

    def __init__(
        self, store: JudgmentStore, source: str, *, correct: bool, writer: Writer | None = None
    ) -> None:
        self._store, self._source = store, source
        self._correct, self._writer = correct, writer
        self._scratch = None if writer is not None else _Scratch()
        self._waiting: list[Judgment] = []
        self._lines: dict[str, int] = {}  # of those that wait
        self._corrected: dict[str, str] = {}  # old id to new id, where nothing is written

    def take(self, batch: Sequence[Entry], found: Imported) -> None:
        """Settle a batch; count what became of it."""
        held = self._store.held([entry.judgment for entry in batch])
        if self._scratch is not None:
            held |= self._scratch.held({entry.key for entry in batch})
        fresh: dict[Key, Judgment] = {}
        later: list[Judgment] = []
        asked: list[Judgment] = []  # corrections that the file itself names
        for entry in batch:
            old = held.get(entry.key)
            try:
                new = self._settle(entry, old)
            except DataError as error:
                found.problems.append(RowProblem(self._source, entry.line, str(error)))
                continue
            if new is None:
                found.already += 1
                continue
            if new is not entry.judgment:
                found.corrections += 1
            elif new.corrects is not None:
                asked.append(new)
            later.append(new)
            self._lines[new.id] = entry.line
            first = new.id if old is None else old.first
            held[entry.key] = Held(first, new.id, content_of(new), new.judged_at)
            fresh[entry.key] = new
        if self._scratch is None:
            self._write(later, found, last=False)
        else:
            self._scratch.keep({key: held[key] for key in fresh})
            found.added += len(later)
            self._check(asked, found)

    def end(self, found: Imported) -> None:
        """Settle corrections whose target had not come."""
        if self._scratch is None:
            self._write([], found, last=True)
            return
        there = self._scratch.among({one.corrects or "" for one in self._waiting})
        self._scratch.close()
        for one in self._waiting:
            if one.corrects not in there:
                self._refuse(one, unknown(one), found)
                found.added -= 1

    def _settle(self, entry: Entry, old: Held | None) -> Judgment | None:
        """Return what is to be added for an entry; None where it is there already."""
        one, revised = entry.judgment, entry.revised_at
        if old is None:
            return one
        if revised is None:
            if one.id != old.first:
                raise holds_another(one, old.first)
            return None
        if old.content == content_of(one):
            return None
        if old.first != old.latest and revised <= old.judged_at:
            return None  # an older state of what has been corrected since
        if not self._correct:
            raise holds_another(one, old.first)
        name = f"{one.external_id}@{revised.isoformat()}"
        return replace(one, external_id=name, judged_at=revised, corrects=old.latest)

    def _write(self, fresh: list[Judgment], found: Imported, *, last: bool) -> None:
        assert self._writer is not None
        batch = [*fresh, *self._waiting] if last else fresh
        written = self._writer.put(batch, strict=False, last=last)
        found.added += written.added
        found.already += written.already
        for one, error in written.refused:
            self._refuse(one, error, found)
        self._waiting += written.waiting
        self._lines = {one.id: self._lines[one.id] for one in self._waiting}

    def _check(self, corrections: list[Judgment], found: Imported) -> None:
        """Find what writing would refuse: corrections of nothing, and second ones."""
        by = self._store.corrections({one.corrects or "" for one in corrections}) | self._corrected
        for one in corrections:
            old = one.corrects or ""
            if by.setdefault(old, one.id) != one.id:
                self._refuse(one, corrected_twice(one, by[old]), found)
                found.added -= 1
            self._corrected[old] = by[old]
        there = self._store.existing({one.corrects or "" for one in corrections})
        self._waiting += [one for one in corrections if one.corrects not in there]
        self._lines = {one.id: self._lines[one.id] for one in self._waiting}

    def _refuse(self, one: Judgment, error: DataError, found: Imported) -> None:
        found.problems.append(RowProblem(self._source, self._lines[one.id], str(error)))


class _Scratch:
    """What a file has held so far, in a nameless SQLite database on disk that goes with it."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode=OFF")
        self._database.execute(
            "CREATE TABLE held (key BLOB PRIMARY KEY, first TEXT, latest TEXT, content BLOB, "
            "judged_at TEXT) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Let it vanish."""
        self._database.close()

    def keep(self, held: Mapping[Key, Held]) -> None:
        """Keep what holds these names now."""
        rows = [(_name(key), *one[:3], one.judged_at.isoformat()) for key, one in held.items()]
        self._database.execute("BEGIN")
        self._database.executemany("INSERT OR REPLACE INTO held VALUES (?, ?, ?, ?, ?)", rows)
        self._database.execute("COMMIT")

    def held(self, keys: Iterable[Key]) -> dict[Key, Held]:
        """Return what holds these names, where something does."""
        found = {}
        query = "SELECT first, latest, content, judged_at FROM held WHERE key = ?"
        for key in keys:
            row = self._database.execute(query, (_name(key),)).fetchone()
            if row is not None:
                first, latest, content, judged_at = row
                found[key] = Held(first, latest, content, datetime.fromisoformat(judged_at))
        return found

    def among(self, ids: set[str]) -> set[str]:
        """Return those of the ids that the file holds."""
        rows = self._database.execute("SELECT latest FROM held") if ids else ()
        return {one for (one,) in rows if one in ids}


def _name(key: Key) -> bytes:
    """Name a source and an external id, neither of which holds NUL, in 16 bytes."""
    return hashlib.sha256("\0".join(key).encode()).digest()[:16]
