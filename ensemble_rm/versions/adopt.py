"""A plain saved ensemble as a folder's first version, and the digest of an ensemble's members."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ensemble_rm.errors import StorageError, VersionError
from ensemble_rm.versions.atomic_files import read_json
from ensemble_rm.versions.locate import EVIDENCE, FEATURES
from ensemble_rm.versions.version import Version, library_versions

FILE = "ensemble.json"
MEMBERS = "members"


def describe_ensemble(folder: Path) -> dict[str, Any]:
    """Read an ensemble's ``ensemble.json``.

    Raises
    ------
    VersionError
        If the folder holds no ensemble.
    """
    if not (folder / FILE).exists():
        raise VersionError(f"{folder} holds neither versions nor an ensemble")
    said = read_json(folder / FILE)
    if not isinstance(said, dict) or not {"members", "normaliser", "aggregator"} <= set(said):
        raise StorageError(f"{folder / FILE} is damaged: it names no members")
    return said


def digest_members(folder: Path) -> str:
    """Return the SHA-256 of the files that an ensemble's normalised scores depend on.

    The kind of device is not among it: scores of a CPU and of a GPU count as the same.
    """
    said = describe_ensemble(folder)
    found = hashlib.sha256()
    found.update(json.dumps([said["members"], said["normaliser"]], sort_keys=True).encode())
    for path in sorted((folder / MEMBERS).rglob("*")):
        if path.is_file():
            found.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()


def ensemble_version(
    folder: Path, *, number: int, parent: int | None, created_at: str, run: str, **provenance: Any
) -> Version:
    """Describe an ensemble's folder as a version."""
    said = describe_ensemble(folder)
    return Version(
        number,
        "ensemble",
        number,
        parent,
        created_at,
        digest_members(folder),
        said.get("calibration"),
        run,
        {"training": said.get("provenance", {})} | provenance,
        library_versions(),
    )


def copy_ensemble(source: Path, target: Path) -> None:
    """Give an ensemble's files a second name in `target`; copy them where links are not to be had.

    The plain files stay: a process that has read the ensemble goes on with them.
    """
    own = [source / name for name in (FILE, EVIDENCE, FEATURES)]
    names = [*own, *sorted((source / MEMBERS).rglob("*"))]
    for path in names:
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), place)
            except OSError:
                shutil.copyfile(path, place)
