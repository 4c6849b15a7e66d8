"""A temporary PostgreSQL server: its own cluster in a temporary folder, on a Unix socket."""

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
    """No server can be started; the message says why."""


def find_binaries() -> Path:
    """Return the folder of initdb, which is not on the path on Debian."""
    initdb = shutil.which("initdb")
    if initdb is not None:
        return Path(initdb).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not folders:
        raise NoServerError("PostgreSQL's initdb is not installed")
    return folders[-1].parent


def server_user() -> dict[str, Any]:
    """Return the user to run the server as, since it refuses root."""
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
    """Run a server; yield the folder of its socket."""
    binaries, who = find_binaries(), server_user()
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has at most 107 bytes
    if who:
        os.chown(folder, who["user"], who["group"])
    data = folder / "data"

    def run(*command: str | Path) -> None:
        # The output goes to a file: the server would hold a pipe open.
        with (folder / "output").open("w+") as output:
            done = subprocess.run(
                list(map(str, command)),
                stdout=output,
                stderr=output,
                cwd=folder,
                check=False,
                **who,
            )
            output.seek(0)
            if done.returncode != 0:
                raise NoServerError(f"{Path(command[0]).name}: {output.read()[-500:]}")

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


def new_store_url(socket: Path) -> str:
    """Create an empty schema; return a URL whose tables are in it.

    A schema and not a database: a database is a copy of 300 files.
    """
    import psycopg

    name = f"store_{uuid4().hex}"
    with psycopg.connect(
        host=str(socket), user=OWNER, dbname="postgres", autocommit=True
    ) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"postgresql://{OWNER}@/postgres?host={socket}&options=-csearch_path%3D{name}"
