"""Erase judgments: their texts in the store, and everything that was derived from them.

An operator's command, which no job calls. Digests, verdicts and the chain stay, so that the store
can still be checked.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.errors import StorageError
from ensemble_rm.evidence.score_table import FOLDER
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.versions.repository import Versions
from ensemble_rm.versions.version import Version

if TYPE_CHECKING:
    from ensemble_rm.judgments.database.erasing import ErasedRow

# Deleted whole: their keys are digests of a model and its tokens, which do not name a text.
_CACHES = ("features.sqlite", "scores.sqlite", "states-*.bin")
_SCRATCH = ".retraining-*"


@dataclass(frozen=True, kw_only=True)
class TrainedVersion:
    """A version that was fitted or trained on an erased judgment.

    Attributes
    ----------
    run : str
        The run folder.
    version : int
    kind : str
        ``"calibration"`` or ``"ensemble"``.
    certain : bool
        False where the version does not record which batches it read, and times decide.
    """

    run: str
    version: int
    kind: str
    certain: bool


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """The result of `erase_judgments`.

    Attributes
    ----------
    judgments : tuple of str
        Ids of the judgments without texts: those that were named, and those that share a text with
        one of them.
    shared : tuple of str
        The latter alone.
    texts : int
        Texts that were emptied; in a dry run, that would be.
    scores : int
        Pairs whose scores were deleted from the run folders.
    files : tuple of str
        Cache files and folders that were deleted.
    versions : tuple of TrainedVersion
        Versions that were trained on the judgments; they are not changed.
    dry_run : bool
        Whether nothing was written.
    """

    judgments: tuple[str, ...]
    shared: tuple[str, ...]
    texts: int
    scores: int
    files: tuple[str, ...]
    versions: tuple[TrainedVersion, ...]
    dry_run: bool


def erase_judgments(
    store: JudgmentStore,
    ids: Collection[str],
    *,
    runs: Sequence[str | Path] = (),
    caches: Sequence[str | Path] = (),
    keep_shared: bool = False,
    dry_run: bool = False,
) -> Erasure:
    """Remove judgments' texts and what was derived from them; list the versions trained on them.

    Parameters
    ----------
    store : JudgmentStore
        Open for writing.
    ids : collection of str
        Of judgments. To erase all of an annotator or a prompt, read their ids from the store.
    runs : sequence of str or Path
        Run folders of the jobs that read the store: scores of the pairs are deleted, and what a
        killed retraining left.
    caches : sequence of str or Path
        Cache folders. Their features, raw scores and token states are deleted whole, because their
        keys do not name texts; they are computed again.
    keep_shared : bool
        Keep texts that other judgments use. By default those are erased too, and so are the
        judgments.
    dry_run : bool
        Report what would be erased, and write nothing.

    Returns
    -------
    Erasure

    Raises
    ------
    DataError
        If a judgment is not stored; nothing is erased.
    StorageError
        If something cannot be written. The same call completes it.
    """
    rows, texts = store.erase(ids, keep_shared=keep_shared, dry_run=dry_run)
    pairs = [row.pair for row in rows]
    corrected = store.correction_links([row.id for row in rows])
    trained = [entry for run in runs for entry in _trained_versions(Path(run), rows, corrected)]
    files: list[str] = []
    for folder, patterns in [(run, (_SCRATCH,)) for run in runs] + [(c, _CACHES) for c in caches]:
        files += _delete(Path(folder).expanduser(), patterns, dry_run=dry_run)
    scores = 0
    for run in runs:
        for path in sorted((Path(run).expanduser() / FOLDER).glob("*.sqlite")):
            scores += _delete_scores(path, pairs, dry_run=dry_run)
    return Erasure(
        judgments=tuple(row.id for row in rows),
        shared=tuple(row.id for row in rows if not row.asked),
        texts=texts,
        scores=scores,
        files=tuple(files),
        versions=tuple(trained),
        dry_run=dry_run,
    )


def _delete_scores(path: Path, pairs: Sequence[bytes], *, dry_run: bool) -> int:
    try:
        with closing(sqlite3.connect(path, timeout=60)) as db:
            db.execute("PRAGMA secure_delete=ON")
            rows = 0
            with db:
                for pair in pairs:
                    there = db.execute("SELECT 1 FROM scores WHERE pair = ?", (pair,)).fetchone()
                    rows += there is not None
                    if not dry_run:
                        for (table,) in db.execute(
                            "SELECT name FROM sqlite_master WHERE type = 'table'"
                        ).fetchall():
                            db.execute(f'DELETE FROM "{table}" WHERE pair = ?', (pair,))
            if rows and not dry_run:
                db.execute("VACUUM")
            return rows
    except sqlite3.Error as error:
        raise StorageError(f"{path}: {error}; delete the file, which is computed again") from error


def _delete(folder: Path, patterns: Iterable[str], *, dry_run: bool) -> Iterator[str]:
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            yield str(path)
            if dry_run:
                continue
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                for log in folder.glob(f"{path.name}-*"):  # -wal and -shm of SQLite
                    log.unlink()
            except OSError as error:
                raise StorageError(f"{path} cannot be deleted: {error}") from error


# Versions ----------------------------------------------------------------------------------------


def _trained_versions(
    run: Path, rows: Sequence[ErasedRow], corrected: dict[str, int]
) -> Iterator[TrainedVersion]:
    for version in Versions(run).all():
        known = _read_judgments(version)
        if known is None:
            continue
        answers = {_contains(known, version, row, corrected.get(row.id)) for row in rows}
        if answers != {False}:
            certain = True in answers
            yield TrainedVersion(
                run=str(run), version=version.number, kind=version.kind, certain=certain
            )


def _read_judgments(version: Version) -> dict[str, Any] | None:
    """Return what a version records about its judgments; None if it had none."""
    provenance = version.provenance
    known = provenance.get("judgments")
    if known is None:
        retraining = provenance.get("retraining") or {}
        known = retraining.get("judgments")
        if known is None and "judged" in retraining:  # of a release before the chain
            known = {}
    return known if isinstance(known, dict) else None


def _contains(
    known: dict[str, Any], version: Version, row: ErasedRow, corrected: int | None
) -> bool | None:
    """Return whether a version read a judgment; None where its record cannot tell."""
    links = (known.get("chain") or {}).get("links")
    if links is not None and row.link > links:
        return False
    if "first" in known and "last" in known:
        first, last = (datetime.fromisoformat(known[name]) for name in ("first", "last"))
        # Recorded in whole seconds.
        if not first.timestamp() <= int(row.judged_at.timestamp()) <= last.timestamp():
            return False
    elif row.judged_at > datetime.fromisoformat(version.created_at):
        return False
    if links is None:
        return None
    return corrected is None or corrected > links
