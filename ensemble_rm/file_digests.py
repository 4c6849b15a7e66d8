"""SHA-256 digests of files: recorded when something is saved, compared when it is loaded.

Hashing reads each file once, largest first and in threads (hashlib frees the interpreter), so that
what is hashed is in the page cache when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, get_args

from ensemble_rm.errors import DigestMismatchError, OptionError, StorageError

Verify: TypeAlias = Literal["full", "stat"]
"""``"full"`` hashes every file; ``"stat"`` hashes small ones, and compares the others' sizes."""

SMALL = 2**20
"""Bytes of the largest file that ``"stat"`` hashes, too: configs and templates, but no weights."""

SEAL = "sha256"
"""The field of a JSON object with the digest of its other fields."""

_THREADS = 4
_WORTH_THREADS = 2**23  # bytes; below it, starting threads takes longer
_SHOWN = 5  # problems that a message names

Stamp: TypeAlias = tuple[int, int, int, int, int]
"""Device, inode, size, and times of the last change of the content and of the inode."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Digest and size of a file.

    Attributes
    ----------
    sha256 : str
        Hexadecimal.
    bytes : int
    """

    sha256: str
    bytes: int


FileDigests: TypeAlias = Mapping[str, FileDigest]
"""By the path relative to a folder, with forward slashes."""


def stamp(path: Path) -> Stamp:
    """Return what changes whenever a file does, without reading it."""
    status = path.stat()
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,  # unlike the line above, no program can set it back
    )


class FileCheck:
    """Hashes files and compares them with digests; each file is hashed once.

    Parameters
    ----------
    mode : {"full", "stat"}
        See `Verify`.

    Raises
    ------
    OptionError
        If there is no such mode.
    """

    def __init__(self, mode: Verify = "full") -> None:
        if mode not in get_args(Verify):
            raise OptionError(f"verify must be one of {get_args(Verify)}, not {mode!r}")
        self.mode: Verify = mode
        self._known: dict[Stamp, FileDigest] = {}

    def digests(self, folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
        """Return the digests of files.

        Parameters
        ----------
        folder : Path
        names : iterable of str
            Paths relative to the folder.

        Raises
        ------
        OSError
            If a file cannot be read.
        """
        stamps = {name: stamp(folder / name) for name in names}
        # Files that are links to one file are hashed once.
        missing = {s: folder / name for name, s in stamps.items() if s not in self._known}
        paths = sorted(missing.items(), key=lambda item: -item[0][2])
        if len(paths) > 1 and sum(s[2] for s in missing) >= _WORTH_THREADS:
            with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
                hashed = list(pool.map(_hash, [path for _, path in paths]))
        else:
            hashed = [_hash(path) for _, path in paths]
        self._known.update(zip([s for s, _ in paths], hashed, strict=True))
        return {name: self._known[s] for name, s in stamps.items()}

    def compare(
        self, folder: Path, files: FileDigests, *, what: str, unexpected: Iterable[str] = ()
    ) -> None:
        """Compare files with their recorded digests.

        Parameters
        ----------
        folder : Path
        files : mapping of str to FileDigest
        what : str
            What the files are, for the message: ``"the ensemble runs/hh"``.
        unexpected : iterable of str
            Names of files that are there and would be read; those that are not recorded are an
            error, too.

        Raises
        ------
        DigestMismatchError
            If a file is missing, unexpected, or differs.
        """
        problems = [f"{name} is new" for name in sorted(set(unexpected) - set(files))]
        same_size = []
        for name, recorded in files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                problems.append(f"{name} is missing")
                continue
            if size != recorded.bytes:
                problems.append(f"{name} has {size} bytes, not {recorded.bytes}")
            elif self.mode == "full" or size <= SMALL:
                same_size.append(name)
        try:
            now = self.digests(folder, same_size)
        except OSError as error:
            raise StorageError(f"{what} cannot be read: {error}") from error
        problems += [
            f"{name} has SHA-256 {digest.sha256[:12]}…, not {files[name].sha256[:12]}…"
            for name, digest in now.items()
            if digest.sha256 != files[name].sha256
        ]
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise DigestMismatchError(
                f"{what} in {folder} changed after it was saved: "
                f"{'; '.join(problems[:_SHOWN])}{more}. Restore the files from a backup; for a "
                "change that you want, train or combine the ensemble again"
            )


def _hash(path: Path) -> FileDigest:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileDigest(digest.hexdigest(), os.fstat(stream.fileno()).st_size)


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files in a folder and below it, relative to it."""
    below = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(below)


def is_hidden(name: str) -> bool:
    """Return whether a path has a part that begins with a dot, as what file managers leave has."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def digests_json(files: FileDigests) -> dict[str, dict[str, Any]]:
    """Return digests as JSON values, which the schema layer reads."""
    return {name: asdict(digest) for name, digest in files.items()}


# JSON objects that contain their own digest ------------------------------------------------------


def seal(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the digest of its fields as a further field."""
    return {**row, SEAL: _row_digest(row)}


def unseal(row: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], bool]:
    """Return a sealed object's other fields, and whether it was sealed; older files are not.

    Raises
    ------
    DigestMismatchError
        If a field has changed since.
    """
    values = dict(row)
    if SEAL not in values:
        return values, False
    sealed = values.pop(SEAL)
    if sealed != (now := _row_digest(values)):
        raise DigestMismatchError(
            f"{path} changed after it was saved: its content has SHA-256 {now[:12]}…, not "
            f"{str(sealed)[:12]}…. Restore the file from a backup"
        )
    return values, True


def _row_digest(row: Mapping[str, Any]) -> str:
    # Of the values, not the bytes: another indentation is the same file.
    text = json.dumps(row, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
