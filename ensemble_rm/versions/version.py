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
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version as installed_version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors import SafetensorError
from safetensors.numpy import load_file

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.errors import (
    DigestMismatchError,
    EnsembleRMError,
    OptionError,
    SchemaError,
    StorageError,
    VersionError,
)
from ensemble_rm.file_digests import SEAL, FileCheck, FileDigest, seal, unseal
from ensemble_rm.saved_json import as_object, at, convert, from_row, read_json, reading

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
    files : mapping of str to FileDigest, optional
        Digests of the files in its folder; None in versions that were published before they were
        recorded.
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
    files: Mapping[str, FileDigest] | None = None

    def __post_init__(self) -> None:
        try:
            datetime.fromisoformat(self.created_at)
        except ValueError:
            raise OptionError(
                f"created_at must be a time in ISO 8601, not {self.created_at!r}"
            ) from None
        if not 1 <= self.ensemble <= self.number:
            raise OptionError(f"version {self.number} cannot belong to ensemble {self.ensemble}")
        if self.kind == "ensemble" and self.ensemble != self.number:
            raise OptionError(
                f"version {self.number} has members, so it cannot belong to {self.ensemble}"
            )
        if self.kind == "calibration" and self.calibration is None:
            raise OptionError(f"version {self.number} is a calibration and has none")
        if self.parent is not None and not 1 <= self.parent < self.number:
            raise OptionError(f"version {self.number} cannot have the parent {self.parent}")

    def read_calibration(self, *, evidence: ScoredPairs | None = None) -> Calibration | None:
        """Return the calibration, if there is one."""
        if self.calibration is None:
            return None
        with at("calibration"):
            return Calibration.from_json(self.calibration, evidence=evidence)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return seal({"format": FORMAT} | asdict(self))

    @classmethod
    def from_json(cls, row: Any) -> Version:
        """Read what `to_json` wrote.

        Raises
        ------
        StorageError
            If its format is unknown.
        SchemaError
            If a value does not belong there.
        """
        values = as_object(row)
        values.pop(SEAL, None)  # `read_version` has compared it
        if "format" not in values:
            raise SchemaError("missing", field="format")
        written = values.pop("format")
        if written != FORMAT:
            raise StorageError(
                f"a version of format {written!r:.80}; this library reads {FORMAT}: install the "
                "ensemble-rm that wrote it, or a newer one"
            )
        return from_row(cls, values)


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

    def __post_init__(self) -> None:
        if not 1 <= self.version <= self.newest:
            raise OptionError(f"version {self.version} cannot be current of {self.newest}")

    @classmethod
    def from_json(cls, row: Any) -> Pointer:
        """Read it; `SchemaError` if a value does not belong there."""
        return from_row(cls, row)


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
    with reading(folder / CURRENT):
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
    path = version_folder(folder, chosen) / DESCRIPTION
    try:
        with reading(path):
            row, _ = unseal(as_object(read_json(path)), path)
            version = Version.from_json(row)
            if version.number != chosen:
                raise SchemaError(f"must be {chosen}, not {version.number}", field="number")
            version.read_calibration()  # its values belong to the file
    except DigestMismatchError:
        raise
    except StorageError as error:
        raise StorageError(f"version {chosen} of {folder}: {error}") from error
    return version


@dataclass(frozen=True)
class Located:
    """Where the parts of one version are.

    Attributes
    ----------
    ensemble : Path
        Folder of the members, normaliser and aggregator.
    version : Version, optional
        None for a plain ensemble.
    members : Version, optional
        The version whose folder the members are in.
    calibration : Calibration, optional
        The version's own, if it is not the one stored with the members.
    """

    ensemble: Path
    version: Version | None
    members: Version | None
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
        return Located(folder, None, None, None)
    version = read_version(folder, number)
    ensemble = version_folder(folder, version.ensemble) / ENSEMBLE
    if version.kind == "ensemble":
        return Located(ensemble, version, version, None)
    members = read_version(folder, version.ensemble)
    if members.members != version.members:
        raise DigestMismatchError(
            f"version {version.number} of {folder} was published for members of digest "
            f"{version.members[:12]}…, but version {members.number} has {members.members[:12]}…. "
            "Restore the versions from a backup"
        )
    return Located(ensemble, version, members, read_calibration(folder, version))


def read_calibration(folder: Path, version: Version) -> Calibration:
    """Return the calibration of a version of that kind, with its stored scores, if any."""
    own = version_folder(folder, version.number)
    if version.files is not None:
        FileCheck().compare(own, version.files, what=f"version {version.number}")
    with reading(own / DESCRIPTION):
        names = subset_names(version.calibration)
        calibration = version.read_calibration(evidence=read_evidence(own / EVIDENCE, names))
        if calibration is None:
            raise SchemaError("missing", field="calibration")
        return calibration


def subset_names(calibration: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the names of a stored calibration's subsets, which its evidence refers to."""
    with at("calibration", "subset_names"):
        names: tuple[str, ...] = convert(
            tuple[str, ...], (calibration or {}).get("subset_names", [])
        )
    return names


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
    except (OSError, SafetensorError, EnsembleRMError, TypeError, LookupError) as error:
        raise StorageError(f"{path} cannot be read: {error!r}") from error
