"""Which version of a folder is meant, and where its parts lie: all that a reader needs.

A folder of versions, beside the plain ensemble that it may have begun as::

    runs/hh/
      current.json          {"version": 3, "newest": 3, "pinned": false}
      audit.jsonl           one line an event
      versions/0001/        version.json, ensemble/ (as `save_pretrained` writes it)
      versions/0003/        version.json, calibration.safetensors: a calibration of ensemble 1

A version is written under another name and renamed, and never changed or removed afterwards;
``current.json`` is replaced by a rename. So a reader takes no lock and sees no half. A small file
and no symbolic link: every file system has files, Windows allows links to few, copies and archives
resolve them; and one rename moves the number and the pin together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.errors import EnsembleRMError, OptionError, StorageError, VersionError
from ensemble_rm.versions.atomic_files import read_json
from ensemble_rm.versions.version import Pointer, Version

CURRENT = "current.json"
DESCRIPTION = "version.json"
EVIDENCE = "calibration.safetensors"
FEATURES = "features.safetensors"
ENSEMBLE = "ensemble"


def is_versioned(folder: Path) -> bool:
    """Say whether a folder holds versions, and not only a plain ensemble."""
    return (folder / CURRENT).exists()


def read_pointer(folder: Path) -> Pointer:
    """Return which version is current.

    Raises
    ------
    VersionError
        If the folder holds no versions.
    StorageError
        If the pointer is damaged.
    """
    if not is_versioned(folder):
        raise VersionError(
            f"{folder} holds no versions; its first `ensemble-rm recalibrate` makes them"
        )
    return Pointer.from_json(read_json(folder / CURRENT))


def version_folder(folder: Path, number: int) -> Path:
    """Return where a version lies."""
    return folder / "versions" / f"{number:04d}"


def read_version(folder: Path, number: int | None = None) -> Version:
    """Return a published version; the current one where no number is given.

    Raises
    ------
    VersionError
        If there is none of that number.
    StorageError
        If it is damaged.
    """
    pointer = read_pointer(folder)
    wanted = pointer.version if number is None else number
    if not 1 <= wanted <= pointer.newest:
        raise VersionError(f"{folder} has the versions 1 to {pointer.newest}, and no {wanted}")
    place = version_folder(folder, wanted)
    try:
        return Version.from_json(read_json(place / DESCRIPTION))
    except StorageError as error:
        raise StorageError(f"version {wanted} of {folder}: {error}") from error


@dataclass(frozen=True)
class Located:
    """Where the parts of one version lie.

    Attributes
    ----------
    ensemble : Path
        Folder of the members, normaliser and aggregator.
    version : Version, optional
        None of a plain ensemble.
    calibration : Calibration, optional
        The version's own, where it is not the one beside the members.
    """

    ensemble: Path
    version: Version | None
    calibration: Calibration | None


def locate(folder: Path, number: int | None = None) -> Located:
    """Find a version's parts; of a plain ensemble, the folder itself.

    Raises
    ------
    VersionError
        If a number is given that the folder has no version of.
    StorageError
        If the version is damaged.
    """
    if number is None and not is_versioned(folder):
        return Located(folder, None, None)
    version = read_version(folder, number)
    place = version_folder(folder, version.ensemble) / ENSEMBLE
    if version.kind == "ensemble":
        return Located(place, version, None)
    return Located(place, version, read_calibration(folder, version))


def read_calibration(folder: Path, version: Version) -> Calibration:
    """Return the calibration of a version of that kind, with its evidence where it was kept."""
    try:
        said: Any = version.calibration
        names = said.get("subset_names", ())
        evidence = read_evidence(version_folder(folder, version.number) / EVIDENCE, names)
        return Calibration.from_json(said, evidence=evidence)
    except (KeyError, TypeError, AttributeError, OptionError, StorageError) as error:
        raise StorageError(f"version {version.number} of {folder} is damaged: {error!r}") from error


def read_evidence(path: Path, names: Any) -> ScoredPairs | None:
    """Read judgments' scores from a file; None where there is no file.

    Raises
    ------
    StorageError
        If it is damaged.
    """
    if not path.exists():
        return None
    try:
        return ScoredPairs.from_arrays(load_file(path), names)
    except (OSError, SafetensorError, EnsembleRMError, TypeError, IndexError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
