"""Atomic file writes: a file is complete or absent, even after a power cut."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ensemble_rm.errors import StorageError


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file atomically: a reader sees the old one or the new one.

    The new one is written next to it, synced to the disk, and renamed over it.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        write_file(scratch, data)
        scratch.replace(path)
    # Ctrl-C must not leave a scratch file either.
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise
    # The rename changes the folder; without this, a power cut could undo it.
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to the disk, if the system can."""
    if os.name == "nt":
        return  # Windows cannot open folders
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """Sync every file below a folder, and the folders themselves, to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb") as stream:
                os.fsync(stream.fileno())
        sync_folder(Path(parent))


def json_bytes(value: Any) -> bytes:
    """Return a JSON value as the bytes of a readable file."""
    # NaN is not valid JSON, and strict parsers reject it.
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the action.

    Parameters
    ----------
    action : str
        For example ``"publishing in runs/hh"``.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = str(error)
        if isinstance(error, OSError) and error.strerror:
            cause = error.strerror + ("" if error.filename is None else f" ({error.filename})")
        raise StorageError(
            f"{action}: {cause}; the current version is unchanged. Free disk space or make the "
            "folder writable, and retry"
        ) from error
