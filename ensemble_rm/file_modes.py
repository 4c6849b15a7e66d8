"""File modes: saved files are as readable as files that the user creates in an editor."""

from __future__ import annotations

import secrets
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and all below it, the mode that the umask gives to new ones.

    safetensors writes files of mode 0600, and `tempfile.mkdtemp` makes folders of mode 0700:
    another user, such as a service's, could not read them.
    """
    # A new folder shows the umask. Reading it with os.umask would set it for all threads.
    probe = path.parent / f".mode-{secrets.token_hex(8)}"
    probe.mkdir()
    try:
        mode = probe.stat().st_mode & 0o777
    finally:
        probe.rmdir()
    for entry in [path, *path.rglob("*")]:
        # A link's target may be a file of the user's, outside of what was saved.
        if entry.is_symlink():
            continue
        # Files are not executable, whatever the umask.
        right = mode if entry.is_dir() else mode & 0o666
        # Some network file systems refuse every chmod, also one that changes nothing.
        if entry.stat().st_mode & 0o777 != right:
            entry.chmod(right)
