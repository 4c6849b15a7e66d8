"""Versions: publish, roll back, pin, list; one writer at a time, any number of readers.

Knows files and descriptions; knows nothing of fits, gates or judgments.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import save

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.errors import LockedError, VersionError
from ensemble_rm.versions import locate as reading
from ensemble_rm.versions.adopt import copy_ensemble, ensemble_version
from ensemble_rm.versions.atomic_files import (
    json_bytes,
    replace_file,
    storage_errors,
    sync_folder,
    sync_tree,
    write_file,
)
from ensemble_rm.versions.audit_log import AuditLog
from ensemble_rm.versions.version import Pointer, Version, library_versions

LOCK = ".lock"
SCRATCH = ".new-"


def now_utc() -> datetime:
    """Return the clock's time."""
    return datetime.now(UTC)


class Versions:
    """The versions of a folder.

    Reading takes no lock. Each change takes the folder's lock, which dies with its process; numbers
    are given under it, from the folder itself and never from a clock.

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
        return reading.is_versioned(self.folder)

    @property
    def pointer(self) -> Pointer:
        """Which version is current, and whether it is pinned."""
        return reading.read_pointer(self.folder)

    @property
    def pinned(self) -> bool:
        """Whether the current version is pinned; never for a plain ensemble."""
        return self.versioned and self.pointer.pinned

    def current(self) -> Version:
        """Return the current version; `VersionError` where there are none."""
        return reading.read_version(self.folder)

    def incumbent(self) -> Version:
        """Return the current version; of a plain ensemble, the one that it would become."""
        if self.versioned:
            return self.current()
        return self._first()

    def show(self, number: int) -> Version:
        """Return a version; `VersionError` where it is not there."""
        return reading.read_version(self.folder, number)

    def all(self) -> list[Version]:
        """Return every published version, oldest first; none of a plain ensemble."""
        if not self.versioned:
            return []
        return [self.show(number) for number in range(1, self.pointer.newest + 1)]

    def ensemble_folder(self, version: Version) -> Path:
        """Return where a version's members lie."""
        if not self.versioned:
            return self.folder
        return reading.version_folder(self.folder, version.ensemble) / reading.ENSEMBLE

    # Writing -----------------------------------------------------------------------------------

    @contextmanager
    def lock(self, *, wait: bool = True) -> Iterator[None]:
        """Hold the folder's lock; one holder may take it again.

        Parameters
        ----------
        wait : bool
            For another process to finish; else it is an error that there is one.

        Raises
        ------
        LockedError
            If another process holds it.
        StorageError
            If the folder cannot be written.
        """
        if not self.folder.is_dir():
            raise VersionError(f"there is no folder {self.folder}")
        with storage_errors(f"locking {self.folder}"):
            try:
                taken = self._lock.acquire(timeout=-1 if wait else 0)
            except Timeout:
                raise LockedError(
                    f"another process works on {self.folder}; wait for it (--wait), or try again"
                ) from None
        with taken:
            yield

    def adopt(self) -> Version:
        """Make a plain ensemble version 1, and current; where versions are, change nothing.

        Its files get a second name, or are copied where the file system has no hard links; the
        plain ones stay for processes that read them.

        Returns
        -------
        Version
            The current one.

        Raises
        ------
        VersionError
            If the folder holds no ensemble.
        """
        with self.lock():
            if self.versioned:
                return self.current()
            first = self._first()
            self.clean()
            self._write(first, lambda place: copy_ensemble(self.folder, place / reading.ENSEMBLE))
            self._say("adopted", version=first.number)
        return first

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
            Name of the run.
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
            If it cannot be written; then the current version is what it was.
        """

        def write(place: Path) -> None:
            if keep_evidence and calibration.evidence is not None:
                arrays = calibration.evidence.arrays()
                contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
                write_file(place / reading.EVIDENCE, save(contiguous))

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
        """Publish an ensemble with members of its own, and make it current.

        Parameters
        ----------
        save : callable
            Writes the ensemble into the folder that it is given: `RewardEnsemble.save_pretrained`.
        provenance : mapping
            JSON values.
        run : str
            Name of the run.

        Returns
        -------
        Version

        Raises
        ------
        VersionError, StorageError
            As `publish_calibration` does.
        """
        with self.lock():
            parent, number = self._next()
            scratch = self._scratch()
            try:
                with storage_errors(f"publishing in {self.folder}"):
                    save(scratch / reading.ENSEMBLE)
                version = ensemble_version(
                    scratch / reading.ENSEMBLE,
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
        """Make an earlier version current; the ones after it stay.

        Parameters
        ----------
        to : int, optional
            The parent of the current one where not given.

        Returns
        -------
        Version
            The current one.

        Raises
        ------
        VersionError
            If there is none to go back to, or the current one is pinned.
        """
        with self.lock():
            pointer, now = self.pointer, self.current()
            if pointer.pinned:
                raise VersionError(f"version {now.number} is pinned; unpin it first")
            target = now.parent if to is None else to
            if target is None:
                raise VersionError(f"version {now.number} is the first; there is nothing before it")
            found = self.show(target)
            self._point(Pointer(found.number, pointer.newest))
            self._say("rolled back", version=found.number, before=now.number)
        return found

    def pin(self, number: int | None = None) -> Version:
        """Make a version current and let no job move it.

        Parameters
        ----------
        number : int, optional
            The current one where not given.

        Returns
        -------
        Version
            The current one.

        Raises
        ------
        VersionError
            If there is none of that number.
        """
        with self.lock():
            found = self.current() if number is None else self.show(number)
            self._point(Pointer(found.number, self.pointer.newest, pinned=True))
            self._say("pinned", version=found.number)
        return found

    def unpin(self) -> Version:
        """Let jobs publish again; the current version stays current until one does."""
        with self.lock():
            pointer = self.pointer
            self._point(Pointer(pointer.version, pointer.newest))
            self._say("unpinned", version=pointer.version)
        return self.current()

    def clean(self) -> list[str]:
        """Remove what killed processes left: half-written versions, and whole ones never published.

        Returns
        -------
        list of str
            Names of what was removed.
        """
        with self.lock(), storage_errors(f"cleaning {self.folder}"):
            newest = self.pointer.newest if self.versioned else 0
            places = [*self.folder.glob(f".{reading.CURRENT}.*")]
            for place in (self.folder / "versions").glob("*"):
                numbered = place.name.isdigit() and int(place.name) > newest
                if numbered or place.name.startswith(SCRATCH):
                    places.append(place)
            for place in places:
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            return [place.name for place in places]

    # Inside ------------------------------------------------------------------------------------

    def _first(self) -> Version:
        return ensemble_version(
            self.folder, number=1, parent=None, created_at=self._time(), run="", adopted=True
        )

    def _time(self) -> str:
        return self.clock().isoformat(timespec="seconds")

    def _next(self) -> tuple[Version, int]:
        if not self.versioned:
            self.adopt()
        pointer = self.pointer
        if pointer.pinned:
            raise VersionError(f"version {pointer.version} is pinned; unpin it, then publish")
        self.clean()
        return self.current(), pointer.newest + 1

    def _scratch(self) -> Path:
        place = self.folder / "versions" / f"{SCRATCH}{os.getpid()}-{secrets.token_hex(4)}"
        with storage_errors(f"publishing in {self.folder}"):
            place.mkdir(parents=True)
        return place

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
            write_file(scratch / reading.DESCRIPTION, json_bytes(version.to_json()))
            sync_tree(scratch)
            place = reading.version_folder(self.folder, version.number)
            scratch.rename(place)
            sync_folder(place.parent)
        self._point(Pointer(version.number, version.number))

    def _point(self, pointer: Pointer) -> None:
        said = {"version": pointer.version, "newest": pointer.newest, "pinned": pointer.pinned}
        with storage_errors(f"moving what is current in {self.folder}"):
            replace_file(self.folder / reading.CURRENT, json_bytes(said))

    def _say(self, event: str, **fields: Any) -> None:
        with storage_errors(f"writing the audit log of {self.folder}"):
            self.audit.append({"event": event, "at": self._time()} | fields)
