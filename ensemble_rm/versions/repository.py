"""Versions: publish, roll back, pin, list; one writer at a time, any number of readers.

Knows files and descriptions; knows nothing of fits, gates or judgments.
"""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import save

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.errors import (
    LockedError,
    StorageError,
    UnknownVersionsError,
    UnverifiedWarning,
    VersionError,
)
from ensemble_rm.file_digests import FileCheck, files_below, unseal
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import as_object, read_json
from ensemble_rm.versions.atomic_files import (
    json_bytes,
    replace_file,
    storage_errors,
    sync_folder,
    sync_tree,
    write_file,
)
from ensemble_rm.versions.audit_log import WITHDRAWN, AuditLog
from ensemble_rm.versions.integrity import MEMBERS, check_ensemble, digest_members
from ensemble_rm.versions.manifest import FILE as ENSEMBLE_FILE, Manifest, read_manifest
from ensemble_rm.versions.version import (
    CURRENT,
    DESCRIPTION,
    ENSEMBLE,
    EVIDENCE,
    FEATURES,
    Pointer,
    Version,
    is_versioned,
    library_versions,
    read_pointer,
    read_version,
    version_folder,
)

LOCK = ".lock"
SCRATCH = ".new-"
ASIDE = ".aside-"
# Events of the audit log around a publication.
INTENT, END, ABANDONED = "publishing", "version published", "publication abandoned"


def now_utc() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class Versions:
    """The versions of a folder.

    Reading takes no lock. Every change takes the folder's lock, which ends with its process.
    Numbers are assigned under the lock, from the folder and never from a clock.

    Parameters
    ----------
    folder : str or Path
        What `RewardEnsemble.from_pretrained` takes, such as ``runs/hh``.
    clock : callable
        Returns the time; for tests.
    """

    def __init__(self, folder: str | Path, *, clock: Callable[[], datetime] = now_utc) -> None:
        self.folder = Path(folder).expanduser()
        self.audit = AuditLog(self.folder)
        self.clock = clock
        self._lock = FileLock(self.folder / LOCK)

    # Reading -----------------------------------------------------------------------------------

    @property
    def versioned(self) -> bool:
        """Whether there are versions, and not only a plain ensemble."""
        return is_versioned(self.folder)

    @property
    def pointer(self) -> Pointer:
        """The current version, and whether it is pinned."""
        return read_pointer(self.folder)

    @property
    def pinned(self) -> bool:
        """Whether the current version is pinned; never for a plain ensemble."""
        return self.versioned and self.pointer.pinned

    def current(self) -> Version:
        """Return the current version; `VersionError` if there are no versions."""
        return read_version(self.folder)

    def incumbent(self) -> Version:
        """Return the current version; for a plain ensemble, the one that it would become."""
        if self.versioned:
            return self.current()
        return self._first()

    def show(self, number: int) -> Version:
        """Return a version; `VersionError` if there is no such number."""
        return read_version(self.folder, number)

    def all(self) -> list[Version]:
        """Return all published versions, oldest first; none for a plain ensemble."""
        if not self.versioned:
            return []
        # A number whose version was set aside or lost is never used again.
        numbers = (n for n in range(1, self.pointer.newest + 1) if self._path(n).is_dir())
        return [self.show(number) for number in numbers]

    def ensemble_folder(self, version: Version) -> Path:
        """Return the folder of a version's members."""
        if not self.versioned:
            return self.folder
        return version_folder(self.folder, version.ensemble) / ENSEMBLE

    # Writing -----------------------------------------------------------------------------------

    @contextmanager
    def lock(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the folder's lock; its holder may take it again.

        Parameters
        ----------
        wait : bool
            Wait for another process to finish, instead of raising.

        Raises
        ------
        LockedError
            If another process holds it.
        StorageError
            If the folder cannot be written.
        """
        if not self.folder.is_dir():
            raise VersionError(f"no such folder: {self.folder}")
        with storage_errors(f"locking {self.folder}"):
            try:
                # A timeout of −1 waits without limit.
                taken = self._lock.acquire(timeout=-1 if wait else 0)
            except Timeout:
                raise LockedError(
                    f"another process is working on {self.folder}; wait for it (--wait), or "
                    "retry later"
                ) from None
        with taken:
            yield

    def adopt(self, *, progress: Progress = silent) -> Version:
        """Turn a plain ensemble into version 1; with existing versions, change nothing.

        Its files are cloned where the file system can (a clone takes no space and is independent),
        else copied. The plain files stay for processes that read them, and may be deleted.

        Parameters
        ----------
        progress : callable
            Called with (stage, done, total) in bytes; the stage says how much is copied.

        Returns
        -------
        Version
            The current one.

        Raises
        ------
        VersionError
            If the folder contains no ensemble.
        DigestMismatchError
            If a file changed after the ensemble was saved.
        StorageError
            If the disk has no room for a copy.
        """
        with self.lock():
            self.settle()
            if self.versioned:
                return self.current()
            first = self._first()
            self.clean()
            sizes: list[int] = []

            def copy(target: Path) -> None:
                sizes.append(copy_ensemble(self.folder, target / ENSEMBLE, progress=progress))
                check_ensemble(target / ENSEMBLE, None, FileCheck())

            with warnings.catch_warnings():
                # From now on, the version has the digests that the plain ensemble lacks.
                warnings.simplefilter("ignore", UnverifiedWarning)
                self._write(first, copy)
            self._log("adopted", version=first.number, copied_bytes=sizes[0])
        return self.current()

    def publish_calibration(
        self,
        calibration: Calibration,
        *,
        provenance: Mapping[str, Any],
        run: str = "",
        keep_evidence: bool = True,
    ) -> Version:
        """Publish a calibration of the current ensemble, and make it current.

        Parameters
        ----------
        calibration : Calibration
            Of the current version's aggregator.
        provenance : mapping
            JSON values: judgments, options, gate, metrics.
        run : str
            Identifier of the run.
        keep_evidence : bool
            Store the judgments' scores, so that another aggregator can be calibrated on them.

        Returns
        -------
        Version

        Raises
        ------
        VersionError
            If the current version is pinned.
        StorageError
            If it cannot be written; the current version is then unchanged.
        """

        def write(target: Path) -> None:
            if keep_evidence and calibration.evidence is not None:
                arrays = calibration.evidence.arrays()
                contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
                write_file(target / EVIDENCE, save(contiguous))

        names = () if calibration.evidence is None else calibration.evidence.subset_names
        with self.lock():
            parent, number = self._next()
            version = Version(
                number,
                "calibration",
                parent.ensemble,
                parent.number,
                self._time(),
                parent.members,
                calibration.to_json() | {"subset_names": list(names)},
                run,
                dict(provenance),
                library_versions(),
            )
            self._write(version, write)
        return version

    def publish_ensemble(
        self, save: Callable[[Path], Any], *, provenance: Mapping[str, Any], run: str = ""
    ) -> Version:
        """Publish an ensemble with its own members, and make it current.

        Parameters
        ----------
        save : callable
            Writes the ensemble into a given folder: `RewardEnsemble.save_pretrained`.
        provenance : mapping
            JSON values.
        run : str
            Identifier of the run.

        Returns
        -------
        Version

        Raises
        ------
        VersionError, StorageError
            See `publish_calibration`.
        """
        with self.lock():
            parent, number = self._next()
            scratch = self._scratch()
            try:
                with storage_errors(f"publishing in {self.folder}"):
                    save(scratch / ENSEMBLE)
                version = ensemble_version(
                    scratch / ENSEMBLE,
                    number=number,
                    parent=parent.number,
                    created_at=self._time(),
                    run=run,
                    **provenance,
                )
                self._finish(version, scratch)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return version

    def rollback(self, to: int | None = None) -> Version:
        """Make an earlier version current; later ones are kept.

        Parameters
        ----------
        to : int, optional
            Default: the parent of the current version.

        Returns
        -------
        Version
            The current one.

        Raises
        ------
        VersionError
            If no earlier version exists, or the current one is pinned.
        """
        with self.lock():
            pointer = self.pointer
            if pointer.pinned:
                raise VersionError(f"version {pointer.version} is pinned; unpin it first")
            # With a number, a current version that cannot be read is no obstacle.
            target = self.current().parent if to is None else to
            if target is None:
                raise VersionError(
                    f"version {pointer.version} is the first; there is none before it"
                )
            version = self.show(target)
            # `newest` stays, so that the next version does not reuse a number.
            self._point(Pointer(version.number, pointer.newest))
            self._log("rolled back", version=version.number, before=pointer.version)
        return version

    def pin(self, number: int | None = None) -> Version:
        """Make a version current, and stop jobs from publishing others.

        Parameters
        ----------
        number : int, optional
            Default: the current version.

        Returns
        -------
        Version
            The current one.

        Raises
        ------
        VersionError
            If there is no version with that number.
        """
        with self.lock():
            version = self.current() if number is None else self.show(number)
            self._point(Pointer(version.number, self.pointer.newest, pinned=True))
            self._log("pinned", version=version.number)
        return version

    def unpin(self) -> Version:
        """Allow jobs to publish again; until then, the current version stays current."""
        with self.lock():
            pointer = self.pointer
            self._point(Pointer(pointer.version, pointer.newest))
            self._log("unpinned", version=pointer.version)
        return self.current()

    def withdraw_run(self, run: str) -> Version | None:
        """Take a run out of account: jobs then decide as if its lines were not in the log.

        For a run under a wrong clock, or on a wrong store. The lines themselves stay, and so does a
        version that it published; `rollback` goes back from that.

        Parameters
        ----------
        run : str
            Identifier, as in the audit log.

        Returns
        -------
        Version, optional
            The current version, if this run published it.

        Raises
        ------
        VersionError
            If the log has no such run, or it was withdrawn already.
        """
        with self.lock():
            if not any(event.get("run") == run for event in self.audit.read()):
                raise VersionError(f"{self.audit.path} has no run {run!r}; see its lines")
            if self.audit.last(run=run) is None:
                raise VersionError(f"run {run} was withdrawn already")
            self._log(WITHDRAWN, run=run)
            current = self.current() if self.versioned else None
        return current if current is not None and _published_by(current, run) else None

    def clean(self) -> list[str]:
        """Remove scratch files of killed processes; never a numbered version.

        Returns
        -------
        list of str
            Names of the removed files and folders.
        """
        with self.lock(), storage_errors(f"cleaning {self.folder}"):
            leftovers = self.leftovers()
            for path in leftovers:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return [path.name for path in leftovers]

    def leftovers(self) -> list[Path]:
        """Return scratch files and folders of killed processes."""
        scratch = (self.folder / "versions").glob(f"{SCRATCH}*")
        return sorted([*self.folder.glob(f".{CURRENT}.*"), *scratch])

    def unknown(self) -> list[int]:
        """Return the numbers of versions above the newest that the pointer knows, ascending."""
        newest = self.pointer.newest if self.versioned else 0
        return [number for number in self._numbers() if number > newest]

    def settle(self) -> None:
        """Finish the publication of a killed process, or set its version aside.

        Raises
        ------
        UnknownVersionsError
            If other versions exist that the pointer does not know: after a restore or a sync, they
            may be published ones.
        """
        with self.lock():
            number = self._open_intent()
            if number is not None:
                self._settle(number)
            unknown = self.unknown()
            if unknown:
                names = ", ".join(str(self._path(number)) for number in unknown)
                known = (
                    f"knows versions up to {self.pointer.newest}"
                    if self.versioned
                    else "is missing"
                )
                raise UnknownVersionsError(
                    f"{self.folder / CURRENT} {known}, but there is {names}; restore the file, or "
                    f"run `ensemble-rm versions repair {self.folder}`"
                )

    def repair(self) -> tuple[list[int], list[int]]:
        """Make the pointer know the versions above its newest; set aside those that are damaged.

        The current version stays. Without a pointer, the highest readable version becomes current.
        No version is deleted: one that is set aside is renamed ``versions/.aside-N-…``.

        Returns
        -------
        (known, aside) : lists of int
            Numbers of the versions that became known, and of those that were set aside.
        """
        with self.lock():
            unknown = self.unknown()
            known = [number for number in unknown if self._whole(number) is not None]
            aside = [number for number in unknown if number not in known]
            for number in aside:
                self._set_aside(number)
            if known:
                before = self.pointer if self.versioned else Pointer(known[-1], known[-1])
                self._point(Pointer(before.version, known[-1], before.pinned))
            if unknown:
                self._log("repaired", known=known, aside=aside)
        return known, aside

    # Internals ---------------------------------------------------------------------------------

    def _first(self) -> Version:
        return ensemble_version(
            self.folder, number=1, parent=None, created_at=self._time(), run="", adopted=True
        )

    def _time(self) -> str:
        return self.clock().isoformat(timespec="seconds")

    def _next(self) -> tuple[Version, int]:
        if not self.versioned:
            self.adopt()
        self.settle()
        pointer = self.pointer
        if pointer.pinned:
            raise VersionError(f"version {pointer.version} is pinned; unpin it, then publish")
        self.clean()
        return self.current(), self._free_number()

    def _free_number(self) -> int:
        """Return a number that no version ever had, even where its folder was lost."""
        # From `newest`, not from the current version, which may be older after a rollback.
        newest = self.pointer.newest if self.versioned else 0
        aside = (self.folder / "versions").glob(f"{ASIDE}*")
        used = [int(path.name.removeprefix(ASIDE).split("-")[0]) for path in aside]
        ended = (event for event in self.audit.read() if event.get("event") == END)
        used += [event["version"] for event in ended if isinstance(event.get("version"), int)]
        return max([newest, *self._numbers(), *used]) + 1

    def _path(self, number: int) -> Path:
        return version_folder(self.folder, number)

    def _numbers(self) -> list[int]:
        names = (path.name for path in (self.folder / "versions").glob("*"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _whole(self, number: int) -> Version | None:
        """Return an unknown version if its description is its own; None if it is damaged."""
        try:
            path = self._path(number) / DESCRIPTION
            row, _ = unseal(as_object(read_json(path)), path)
            version = Version.from_json(row)
        except StorageError:
            return None
        return version if version.number == number else None

    def _open_intent(self) -> int | None:
        """Return the number whose publication the log begins and does not end."""
        number = None
        for event in self.audit.read():
            if event.get("event") == INTENT and isinstance(event.get("version"), int):
                number = event["version"]
            elif event.get("event") in (END, ABANDONED):
                number = None
        return number

    def _settle(self, number: int) -> None:
        pointer = self.pointer if self.versioned else None
        if pointer is not None and pointer.newest >= number:
            # Killed after the pointer moved, before the log's line.
            self._log(END, version=number, repaired=True)
            return
        if not self._path(number).exists():
            self._log(ABANDONED, version=number)
            return
        version = self._whole(number)
        current = None if pointer is None else pointer.version
        pinned = pointer is not None and pointer.pinned
        # A rollback or pin after the kill decides against the version that was on its way.
        if version is not None and version.parent == current and not pinned:
            self._point(Pointer(number, number))
            self._log(END, version=number, repaired=True)
        else:
            self._set_aside(number)
            self._log(ABANDONED, version=number)

    def _set_aside(self, number: int) -> None:
        aside = f"{ASIDE}{number:04d}-{secrets.token_hex(4)}"
        with storage_errors(f"setting aside version {number} of {self.folder}"):
            self._path(number).rename(self.folder / "versions" / aside)
            sync_folder(self.folder / "versions")

    def _scratch(self) -> Path:
        # Next to its final place: a rename is atomic only within one file system.
        scratch = self.folder / "versions" / f"{SCRATCH}{os.getpid()}-{secrets.token_hex(4)}"
        with storage_errors(f"publishing in {self.folder}"):
            scratch.mkdir(parents=True)
        return scratch

    def _write(self, version: Version, write: Callable[[Path], None]) -> None:
        scratch = self._scratch()
        try:
            with storage_errors(f"publishing in {self.folder}"):
                write(scratch)
            self._finish(version, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _finish(self, version: Version, scratch: Path) -> None:
        with storage_errors(f"publishing in {self.folder}"):
            # What a publisher has just written is hashed once more: a disk may have lost some.
            files = FileCheck().digests(scratch, files_below(scratch))
            described = replace(version, files=files)
            write_file(scratch / DESCRIPTION, json_bytes(described.to_json()))
            # Before the rename, so that a numbered folder is never incomplete after a power cut.
            sync_tree(scratch)
            target = self._path(version.number)
            # Before the rename: a numbered folder without an intent is not this process's.
            self._log(INTENT, version=version.number, parent=version.parent)
        try:
            with storage_errors(f"publishing in {self.folder}"):
                scratch.rename(target)
                sync_folder(target.parent)
            # Last, so that a reader finds the new version only when all of it is on the disk.
            self._point(Pointer(version.number, version.number))
        except StorageError:
            # What is reported as failed must not be published by the next job.
            if version.number in self.unknown():
                target.rename(scratch)
            raise
        # The version is published even if the disk has no room for this line; the next job adds it.
        with suppress(StorageError):
            self._log(END, version=version.number)

    def _point(self, pointer: Pointer) -> None:
        with storage_errors(f"changing the current version of {self.folder}"):
            replace_file(self.folder / CURRENT, json_bytes(asdict(pointer)))

    def _log(self, event: str, **fields: Any) -> None:
        with storage_errors(f"writing the audit log of {self.folder}"):
            self.audit.append({"event": event, "at": self._time()} | fields)


def _published_by(version: Version, run: str) -> bool:
    # A retraining has its run in its provenance.
    return run in (version.run, version.provenance.get("retraining", {}).get("run"))


# Plain ensembles ------------------------------------------------------------------------------


def describe_ensemble(folder: Path) -> Manifest:
    """Read an ensemble's ``ensemble.json``.

    Raises
    ------
    VersionError
        If the folder contains no ensemble.
    StorageError
        If the file is damaged.
    """
    if not (folder / ENSEMBLE_FILE).exists():
        raise VersionError(f"{folder} contains neither versions nor an ensemble")
    return read_manifest(folder)


def ensemble_version(
    folder: Path, *, number: int, parent: int | None, created_at: str, run: str, **provenance: Any
) -> Version:
    """Describe an ensemble's folder as a version."""
    manifest = describe_ensemble(folder)
    return Version(
        number,
        "ensemble",
        number,
        parent,
        created_at,
        digest_members(folder, files=manifest.files),
        manifest.calibration,
        run,
        {"training": manifest.provenance} | provenance,
        library_versions(),
    )


def copy_ensemble(source: Path, target: Path, *, progress: Progress = silent) -> int:
    """Clone an ensemble's files into `target`, or copy those that the file system cannot clone.

    Never a hard link: what overwrites one of its names changes the other. The plain files stay,
    because a process that loaded the ensemble may still read them.

    Parameters
    ----------
    source, target : Path
    progress : callable
        Called with (stage, done, total) in bytes for what is copied; the stage says how much.

    Returns
    -------
    int
        Bytes that were copied; 0 if all files were cloned.

    Raises
    ------
    StorageError
        If the disk has no room for the copies.
    """
    own = [source / name for name in (ENSEMBLE_FILE, EVIDENCE, FEATURES)]
    copies = []
    for path in [*own, *sorted((source / MEMBERS).rglob("*"))]:
        if path.is_file():
            new = target / path.relative_to(source)
            new.parent.mkdir(parents=True, exist_ok=True)
            if not _clone(path, new):
                copies.append((path, new, path.stat().st_size))
    total = sum(size for _, _, size in copies)
    free = shutil.disk_usage(source).free
    if total > free:
        raise StorageError(
            f"version 1 of {source} needs a copy of {_readable(total)}, and {_readable(free)} are "
            "free; free some disk space"
        )
    done, stage = 0, f"copying {_readable(total)} into version 1"
    for path, new, size in copies:
        progress(stage, done, total)
        shutil.copyfile(path, new)
        done += size
    return total


_FICLONE = 0x40049409  # Linux: share a file's blocks until one of the two is written


def _clone(source: Path, target: Path) -> bool:
    """Make a file that shares its blocks with another; return whether the file system can."""
    try:
        import fcntl  # not on Windows

        with source.open("rb") as old, target.open("xb") as new:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
    except (ImportError, OSError):
        target.unlink(missing_ok=True)
        return False
    return True


def _readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
