"""``ensemble.json``: of which members, normaliser, aggregator and calibration an ensemble is made.

Read by the versions, which describe an ensemble without loading it, and by what loads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.normaliser import Normaliser
from ensemble_rm.errors import OptionError, SchemaError, StorageError
from ensemble_rm.file_digests import FileDigest, FileDigests, unseal
from ensemble_rm.saved_json import as_object, at, from_row, read_json, reading

FILE = "ensemble.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class SavedMember:
    """One scorer of a saved ensemble.

    Attributes
    ----------
    kind : str
        Kind of its members; see `member_kind`.
    folder : str
        Relative to the ensemble's folder, and inside it.
    """

    kind: str
    folder: str

    def __post_init__(self) -> None:
        # By the rules of both systems: a folder that was saved on one is opened on the other.
        parts = {*PurePosixPath(self.folder).parts, *PureWindowsPath(self.folder).parts}
        outside = ".." in parts or "\0" in self.folder
        if not parts or outside or PureWindowsPath(self.folder).anchor:
            raise OptionError(
                f"{self.folder!r} is not a folder inside the ensemble's; a member's files are in "
                "members/0, members/1, …"
            )


@dataclass(frozen=True)
class Manifest:
    """The content of ``ensemble.json``.

    Attributes
    ----------
    members : tuple of SavedMember
        One per scorer, at least one.
    normaliser : Normaliser
    aggregator : Aggregator
    calibration : mapping, optional
        As `Calibration.to_json` wrote it, with the names of the evidence's subsets.
    provenance : mapping
        JSON values, as training recorded them.
    files : mapping of str to FileDigest, optional
        Digests of all other files in the folder; None in files of older versions.
    row : mapping
        The same as JSON, for digests.
    """

    members: tuple[SavedMember, ...]
    normaliser: Normaliser
    aggregator: Aggregator
    calibration: Mapping[str, Any] | None
    provenance: dict[str, Any]
    files: FileDigests | None
    row: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _ManifestRow:
    format: int
    members: tuple[SavedMember, ...]
    normaliser: Normaliser
    aggregator: Mapping[str, Any]
    calibration: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileDigest] | None = None


def read_manifest(folder: Path) -> Manifest:
    """Read an ensemble's ``ensemble.json``.

    Raises
    ------
    StorageError
        If the folder contains no ensemble, or one of another format.
    DigestMismatchError
        If the file changed after it was saved.
    SchemaError
        If a value in the file does not belong there.
    """
    path = folder / FILE
    if not path.exists():
        raise StorageError(f"{folder} contains no ensemble: there is no {FILE}")
    with reading(path):
        row, _ = unseal(as_object(read_json(path)), path)
        if row.get("format") != FORMAT:
            raise StorageError(
                f"{path} has format {row.get('format')!r:.80}; this version reads format {FORMAT}"
            )
        saved = from_row(_ManifestRow, row)
        if not saved.members:
            raise SchemaError("an ensemble has at least one member", field="members")
        with at("aggregator"):
            aggregator = Aggregator.from_json(saved.aggregator)
    return Manifest(
        saved.members,
        saved.normaliser,
        aggregator,
        saved.calibration,
        dict(saved.provenance),
        saved.files,
        row,
    )
