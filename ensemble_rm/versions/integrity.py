"""Whether the files of an ensemble and of its versions are the ones that were saved."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from ensemble_rm.errors import DigestMismatchError, UnverifiedWarning
from ensemble_rm.file_digests import FileCheck, FileDigests, files_below, is_hidden
from ensemble_rm.versions.manifest import Manifest, read_manifest
from ensemble_rm.versions.version import ENSEMBLE, EVIDENCE, FEATURES, Version

MEMBERS = "members"


def digest_members(folder: Path, *, files: FileDigests | None = None) -> str:
    """Return the SHA-256 of the files that an ensemble's normalised scores depend on.

    It does not depend on the device: scores of a CPU and of a GPU count as equal.

    Parameters
    ----------
    folder : Path
        Of ``ensemble.json``.
    files : mapping of str to FileDigest, optional
        Known digests of the files (default: all are hashed).
    """
    row = read_manifest(folder).row
    if files is None:
        names = [f"{MEMBERS}/{name}" for name in files_below(folder / MEMBERS)]
        files = FileCheck().digests(folder, names)
    digest = hashlib.sha256()
    digest.update(json.dumps([row["members"], row["normaliser"]], sort_keys=True).encode())
    for path in sorted(Path(name) for name in files):
        if path.parts[0] == MEMBERS:
            # Names as well: two members whose files are exchanged are another ensemble.
            digest.update(path.as_posix().encode())
            digest.update(bytes.fromhex(files[path.as_posix()].sha256))
    return digest.hexdigest()


def check_ensemble(folder: Path, version: Version | None, check: FileCheck) -> Manifest:
    """Compare an ensemble's files with their digests; return its manifest.

    Parameters
    ----------
    folder : Path
        Of ``ensemble.json``.
    version : Version, optional
        Whose members these are, if there are versions.
    check : FileCheck

    Raises
    ------
    DigestMismatchError
        If a file is missing, new, or another one.

    Warns
    -----
    UnverifiedWarning
        If no digests were recorded.
    """
    manifest = read_manifest(folder)
    present = [name for name in files_below(folder) if _is_read(name)]
    recorded = manifest.files
    if version is not None and version.files is not None:
        own = f"{ENSEMBLE}/"
        recorded = {k.removeprefix(own): v for k, v in version.files.items() if k.startswith(own)}
    if recorded is not None:
        check.compare(folder, recorded, what="the ensemble", unexpected=present)
        return manifest
    # Older versions have one digest of their members; older plain ensembles have none.
    if version is not None and digest_members(folder) != version.members:
        raise DigestMismatchError(
            f"the members in {folder} changed after version {version.number} was published. "
            "Restore the files from a backup, or go back with `ensemble-rm versions rollback`"
        )
    remedy = "load it and save it" if version is None else "retrain it"
    warnings.warn(
        f"{folder} was saved without digests of its files, so that changes to them may go "
        f"unnoticed; {remedy} to record them",
        UnverifiedWarning,
        stacklevel=2,
    )
    return manifest


def _is_read(name: str) -> bool:
    inside = name.startswith(f"{MEMBERS}/") and not is_hidden(name)
    return inside or name in (EVIDENCE, FEATURES)
