"""A throw-away PostgreSQL server: a cluster of its own in a temporary folder, on a Unix socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

OWNER = "judge"
# Faster; the machine's own crash would lose data, a killed writer does not.
SETTINGS = "-c fsync=off -c full_page_writes=off -c listen_addresses='' -c max_connections=50"

WAIT = ("-w", "-t", "600")  # seconds


class NoServerError(Exception):
    """Why there is none."""


def find_binaries() -> Path:
    """The folder of initdb, which Debian keeps off the path."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not folders:
        raise NoServerError("PostgreSQL's initdb is not installed")
    return folders[-1].parent


def servant() -> dict[str, Any]:
    """Whom the server runs as: it refuses root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise NoServerError("PostgreSQL refuses root, and there is no user postgres or nobody")


@contextmanager
def server() -> Iterator[Path]:
    """Run a server; give the folder of its socket."""
    binaries, who = find_binaries(), servant()
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path holds 107 bytes
    if who:
        os.chown(folder, who["user"], who["group"])
    data = folder / "data"

    def run(*command: str | Path) -> None:
        # The output goes to a file: the server would hold a pipe open.
        with (folder / "said").open("w+") as said:
            done = subprocess.run(
                list(map(str, command)), stdout=said, stderr=said, cwd=folder, check=False, **who
            )
            said.seek(0)
            if done.returncode != 0:
                raise NoServerError(f"{Path(command[0]).name}: {said.read()[-500:]}")

    try:
        run(binaries / "initdb", "-D", data, "-U", OWNER, "-A", "trust", "-E", "UTF8", "-N")
        options = f"-k {folder} {SETTINGS}"
        run(binaries / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", *WAIT, "start")
        try:
            yield folder
        finally:
            run(binaries / "pg_ctl", "-D", data, "-m", "immediate", *WAIT, "stop")
    finally:
        shutil.rmtree(folder)


def new_database(socket: Path) -> str:
    """Make an empty database; return its URL."""
    import psycopg

    name = f"db_{uuid4().hex}"
    with psycopg.connect(
        host=str(socket), user=OWNER, dbname="postgres", autocommit=True
    ) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://{OWNER}@/{name}?host={socket}"
