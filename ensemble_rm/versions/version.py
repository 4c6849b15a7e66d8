"""Versions on disk: what one version is, which one is current, and where its parts are.

A folder of versions, next to the plain ensemble that it may have started as::

    runs/hh/
      current.json          {"version": 3, "newest": 3, "pinned": false}
      audit.jsonl           one line per event
      versions/0001/        version.json, ensemble/ (as written by `save_pretrained`)
      versions/0003/        version.json, calibration.safetensors: a calibration of ensemble 1

A version is written under another name and renamed, and never changed or removed afterwards;
``current.json`` is replaced by a rename. So a reader needs no lock and never sees a partial state.
A small file is used instead of a symbolic link because every file system has files, Windows
restricts links, and copies and archives resolve them; and one rename moves number and pin together.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version as installed_version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors import SafetensorError
from safetensors.numpy import load_file

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.errors import EnsembleRMError, OptionError, StorageError, VersionError
from ensemble_rm.versions.atomic_files import read_json

CURRENT = "current.json"
DESCRIPTION = "version.json"
EVIDENCE = "calibration.safetensors"
FEATURES = "features.safetensors"
ENSEMBLE = "ensemble"
FORMAT = 1
Kind: TypeAlias = Literal["ensemble", "calibration"]
LIBRARIES = ("ensemble-rm", "numpy", "scipy", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Version:
    """A published ensemble or calibration.

    Attributes
    ----------
    number : int
        1, 2, …: later versions have higher numbers, independent of the clock.
    kind : str
        ``"ensemble"``: members, normaliser, aggregator, optionally a calibration;
        ``"calibration"``: a calibration of an ensemble with a number of its own.
    ensemble : int
        Number of the version with the members: its own, or the ensemble's.
    parent : int, optional
        The version that was current when it was published.
    created_at : str
        By the publisher's clock, ISO 8601 in UTC.
    members : str
        Digest of the members and the normaliser; equal digests mean equal normalised scores.
    calibration : dict, optional
        Aggregator, temperature, interval, slices and digest of the judgments, as written by
        `Calibration.to_json`.
    run : str
        Identifier of the run that published it, also in the audit log.
    provenance : dict
        Judgments (digest, dates, counts), options, the gate's verdict, metrics before and after.
    libraries : dict
        Versions of the libraries that computed it.
    """

    number: int
    kind: Kind
    ensemble: int
    parent: int | None
    created_at: str
    members: str
    calibration: Mapping[str, Any] | None = None
    run: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] = field(default_factory=dict)

    def read_calibration(self, *, evidence: ScoredPairs | None = None) -> Calibration | None:
        """Return the calibration, if there is one."""
        if self.calibration is None:
            return None
        return Calibration.from_json(self.calibration, evidence=evidence)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_json(cls, row: Any) -> Version:
        """Read what `to_json` wrote.

        Raises
        ------
        StorageError
            If its format is unknown, or it is damaged.
        """
        try:
            values = dict(row)
            written = values.pop("format")
            if written != FORMAT:
                raise StorageError(
                    f"a version of format {written!r}; this library reads {FORMAT}: install the "
                    "ensemble-rm that wrote it, or a newer one"
                )
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"a version's description is damaged: {error!r}") from error


@dataclass(frozen=True, slots=True)
class Pointer:
    """Which version is current.

    Attributes
    ----------
    version : int
        The current one.
    newest : int
        The highest number that was ever current; folders above it were never published.
    pinned : bool
        Whether jobs must not change the current version.
    """

    version: int
    newest: int
    pinned: bool = False

    @classmethod
    def from_json(cls, row: Any) -> Pointer:
        """Read it; `StorageError` if it is damaged."""
        try:
            return cls(int(row["version"]), int(row["newest"]), bool(row["pinned"]))
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"the current version's number is damaged: {error!r}") from None


def library_versions() -> dict[str, str]:
    """Return the installed versions of Python and of the relevant libraries."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = installed_version(name)
        except PackageNotFoundError:
            continue
    return versions


# Reading --------------------------------------------------------------------------------------


def is_versioned(folder: Path) -> bool:
    """Return whether a folder contains versions, and not only a plain ensemble."""
    return (folder / CURRENT).exists()


def read_pointer(folder: Path) -> Pointer:
    """Return which version is current.

    Raises
    ------
    VersionError
        If the folder contains no versions.
    StorageError
        If ``current.json`` is damaged.
    """
    if not is_versioned(folder):
        raise VersionError(
            f"{folder} contains no versions; the first `ensemble-rm recalibrate` creates them"
        )
    return Pointer.from_json(read_json(folder / CURRENT))


def version_folder(folder: Path, number: int) -> Path:
    """Return the folder of a version."""
    return folder / "versions" / f"{number:04d}"


def read_version(folder: Path, number: int | None = None) -> Version:
    """Return a published version; by default the current one.

    Raises
    ------
    VersionError
        If there is no version with that number.
    StorageError
        If it is damaged.
    """
    pointer = read_pointer(folder)
    chosen = pointer.version if number is None else number
    if not 1 <= chosen <= pointer.newest:
        raise VersionError(f"{folder} has versions 1 to {pointer.newest}, but not {chosen}")
    try:
        return Version.from_json(read_json(version_folder(folder, chosen) / DESCRIPTION))
    except StorageError as error:
        raise StorageError(f"version {chosen} of {folder}: {error}") from error


@dataclass(frozen=True)
class Located:
    """Where the parts of one version are.

    Attributes
    ----------
    ensemble : Path
        Folder of the members, normaliser and aggregator.
    version : Version, optional
        None for a plain ensemble.
    calibration : Calibration, optional
        The version's own, if it is not the one stored with the members.
    """

    ensemble: Path
    version: Version | None
    calibration: Calibration | None


def locate(folder: Path, number: int | None = None) -> Located:
    """Find a version's parts; for a plain ensemble, the folder itself.

    Raises
    ------
    VersionError
        If there is no version with that number.
    StorageError
        If the version is damaged.
    """
    if number is None and not is_versioned(folder):
        return Located(folder, None, None)
    version = read_version(folder, number)
    ensemble = version_folder(folder, version.ensemble) / ENSEMBLE
    if version.kind == "ensemble":
        return Located(ensemble, version, None)
    return Located(ensemble, version, read_calibration(folder, version))


def read_calibration(folder: Path, version: Version) -> Calibration:
    """Return the calibration of a version of that kind, with its stored scores, if any."""
    try:
        row: Any = version.calibration
        names = row.get("subset_names", ())
        evidence = read_evidence(version_folder(folder, version.number) / EVIDENCE, names)
        return Calibration.from_json(row, evidence=evidence)
    except (KeyError, TypeError, AttributeError, OptionError, StorageError) as error:
        raise StorageError(f"version {version.number} of {folder} is damaged: {error!r}") from error


def read_evidence(path: Path, names: Any) -> ScoredPairs | None:
    """Read judgments' scores from a file; None if the file does not exist.

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
