"""What goes wrong around a store: many writers, writers killed, a full disk, a read-only folder."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm.judgments.store import JudgmentStore
from tests.support import CHECKOUT, SUPPORT
from tests.support.judgment_writer import SIZE, batch

pytestmark = pytest.mark.slow
KILLS = 20


def start(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(SUPPORT / "judgment_writer.py"), *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0
    )


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def digest_of(numbers: range) -> str:
    """What a store of exactly these batches says, by another way than its own."""
    ids = sorted(bytes.fromhex(one.id) for number in numbers for one in batch(number))
    return hashlib.sha256(b"".join(ids)).hexdigest()


def whole_batches(place: str) -> set[str | None]:
    """The batches in the store, each all there; it reads without an error, row by row."""
    with JudgmentStore.open(place, read_only=True) as store:
        sizes = Counter(one.batch for one in store.read())
    assert set(sizes.values()) <= {SIZE}
    return set(sizes)


def test_eight_writers_lose_nothing_and_double_nothing(store_place: str) -> None:
    """5,200 judgments each: 4,800 of its own, 400 that the neighbour adds, too."""
    own = 12
    writers = [start("write", store_place, i * own, (i + 1) * own + 1) for i in range(8)]
    found = [end(writer) for writer in writers]
    assert sum(one["added"] for one in found) == (8 * own + 1) * SIZE
    assert sum(one["already"] for one in found) == 7 * SIZE
    with JudgmentStore.open(store_place) as store:
        assert store.count() == (8 * own + 1) * SIZE
        assert store.digest() == digest_of(range(8 * own + 1))


def test_a_writer_killed_at_any_moment_leaves_whole_batches(store_place: str) -> None:
    rng = random.Random(0)
    seen: set[str | None] = set()
    JudgmentStore.create(store_place).close()
    for _ in range(KILLS):
        writer = start("pour", store_place)
        assert writer.stdout is not None and writer.stdout.readline() == "0\n"
        begun, until = time.monotonic(), rng.randrange(1, 20)
        for number in range(1, until + 1):
            assert writer.stdout.readline() == f"{number}\n"
        # Some way into a batch, by its own pace, whatever the machine's.
        time.sleep(rng.uniform(0.0, 1.5) * (time.monotonic() - begun) / until)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        there = whole_batches(store_place)
        assert there >= seen
        seen = there
        if not store_place.startswith("postgresql"):
            with sqlite3.connect(store_place) as raw:
                assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            raw.close()
    assert seen
    last = len(seen) + 5  # batches stand in the store in their order
    done = end(start("write", store_place, 0, last))
    assert done["added"] + done["already"] == last * SIZE
    with JudgmentStore.open(store_place) as store:
        assert store.digest() == digest_of(range(last))


# A full disk ------------------------------------------------------------------------------------


def check_starved(place: Path, found: dict[str, Any]) -> None:
    assert found["error"] == "StorageError"
    assert found["said"].startswith(str(place))
    written = whole_batches(str(place))
    with JudgmentStore.open(place, read_only=True) as store:
        assert store.count() == len(written) * SIZE < 100 * SIZE


def test_a_file_that_may_not_grow_is_named_and_nothing_is_broken(tmp_path: Path) -> None:
    place = tmp_path / "store.db"
    check_starved(place, end(start("starve", place, 3)))
    end(start("write", place, 0, 100))  # the same again, with room
    with JudgmentStore.open(place) as store:
        assert store.digest() == digest_of(range(100))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode != 0:
        pytest.skip("a file system of its own needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_nothing_is_broken(small_disk: Path, tmp_path: Path) -> None:
    place = small_disk / "store.db"
    found = end(start("starve", place, 1000))
    assert "full" in found["said"]
    check_starved(place, found)
    (roomy,) = [shutil.copytree(small_disk, tmp_path / "roomy") / "store.db"]
    end(start("write", roomy, 0, 100))
    with JudgmentStore.open(roomy) as store:
        assert store.digest() == digest_of(range(100))


# A read-only folder -----------------------------------------------------------------------------


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that everybody may enter; pytest's own are their owner's alone."""
    folder = Path(tempfile.mkdtemp(prefix="judgments-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("log", [False, True], ids=["closed", "in use"])
def test_a_read_only_folder_is_read_and_refused_by_name(shared_folder: Path, *, log: bool) -> None:
    """Whether its writer left, or is still at it with the log beside the store."""
    place = shared_folder / "store.db"
    store = JudgmentStore.create(place)
    store.add(batch(0))
    before = store.digest()
    keeper = sqlite3.connect(place)
    if log:
        keeper.execute("SELECT count(*) FROM judgments").fetchone()
        store.add(batch(1))
        before = store.digest()
        assert place.with_name("store.db-wal").exists()
    for path in shared_folder.iterdir():
        path.chmod(0o444)
    shared_folder.chmod(0o555)
    user = pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else os.getuid()
    found = end(start("intrude", place, user))
    keeper.close()
    shared_folder.chmod(0o755)
    assert len(found["read"]) == SIZE * (2 if log else 1)
    for deed in ("add", "create", "beside"):
        assert found[deed]["error"] == "StorageError", deed
        assert str(shared_folder) in found[deed]["said"], deed
    for path in shared_folder.iterdir():
        path.chmod(0o644)
    assert store.digest() == before
    assert sorted(path.name for path in shared_folder.iterdir() if path.suffix == ".db") == [
        "store.db"
    ]
