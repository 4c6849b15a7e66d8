"""A process of its own that forks jobs and kills them, or takes their rights and their room.

Run by `test_recalibration_faults.py`; a fork has everything imported, so that a random moment
falls into the job and not into its imports.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ensemble_rm import Versions, recalibrate
from ensemble_rm.errors import StorageError
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.recalibration import RecalibrationOptions
from ensemble_rm.versions.version import locate
from tests.support.recalibration_runs import Loader, judged, stored, write_run

OPTIONS = RecalibrationOptions(gate_share=0.3, delta=0.05, wait=True)
NOBODY = 65534


def work(run: Path, place: Path) -> Any:
    """One run of the job."""
    with JudgmentStore.open(place, read_only=True) as store:
        return recalibrate(run, store, load=Loader(), options=OPTIONS)


def forked(job: Callable[[], object]) -> int:
    """Run a job in a child; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        job()
        code = 0
    except StorageError as error:
        print(f"StorageError: {error}", flush=True)
        code = 4
    finally:
        os._exit(code)


def check(run: Path) -> int:
    """Read the current version and all others as a reader would; return the current number."""
    found = locate(run)
    assert found.version is not None
    calibration = found.version.read_calibration()
    assert calibration is not None and calibration.temperature > 0
    if found.version.kind == "calibration":
        assert found.calibration is not None and found.calibration.evidence is not None
    assert (found.ensemble / "ensemble.json").is_file()
    assert all(version.read_calibration() for version in Versions(run).all())
    return found.version.number


def prepare(folder: Path) -> tuple[Path, list[Path]]:
    """Make a run and two stores that pull its temperature to and fro."""
    run = write_run(folder / "hh", 1.0)
    places = [folder / "one.db", folder / "three.db"]
    for place, t in zip(places, (1.0, 3.0), strict=True):
        stored(place, judged(t, 1200, seed=int(t))).close()
    Versions(run).adopt()
    return run, places


def wait_for_half(run: Path, *, at_most: float) -> None:
    """Return when a version begins to be written, or none has in that many seconds."""
    end = time.perf_counter() + at_most
    while time.perf_counter() < end and not any((run / "versions").glob(".new-*")):
        time.sleep(0.0002)


def kills(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kill jobs at random moments; after each kill, read, and let the next run complete."""
    rng = random.Random(seed)
    run, places = prepare(folder)
    lengths = []
    for place in (*places[::-1], *places[::-1]):
        before, began = check(run), time.perf_counter()
        # In a child, as those that are killed: there it takes longer.
        assert os.waitpid(forked(lambda place=place: work(run, place)), 0)[1] == 0
        lengths.append(time.perf_counter() - began)
        assert check(run) == before + 1
    usual = max(lengths[2:])  # the first two score their pairs
    killed, attempts, published_before_death, leftovers = 0, 0, 0, 0
    while killed < count:
        attempts += 1
        assert attempts < 4 * count, "jobs end before they can be killed"
        place = places[attempts % 2]
        if attempts % 10 == 0:
            shutil.rmtree(run / "scores")  # this one is killed while it scores
        before = check(run)
        child = forked(lambda place=place: work(run, place))
        # Half of the moments are random, a quarter lies near the end, where what is there is moved,
        # and a quarter waits for half a version, whatever the machine's pace.
        if attempts % 4 == 3:
            wait_for_half(run, at_most=3 * usual)
        else:
            time.sleep(usual * (rng.random() if attempts % 4 < 2 else 0.6 + 0.6 * rng.random()))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and attempts % 4 != 3:
            usual *= 0.8  # it was measured while the machine was busier
        after = check(run)
        assert after in (before, before + 1)
        published_before_death += os.WIFSIGNALED(status) and after > before
        leftovers += bool([*(run / "versions").glob(".new-*"), *run.glob(".current.json.*")])
        # The next run finishes a publication that was killed before the pointer moved.
        finished = after > before or (run / "versions" / f"{before + 1:04d}").exists()
        found = work(run, place)
        assert found.verdict == ("kept" if finished else "published"), found
        assert check(run) == before + 1
        assert not [*(run / "versions").glob(".new-*"), *run.glob(".current.json.*")]
    runs = [e["run"] for e in Versions(run).audit.read() if e.get("verdict") == "published"]
    versions = [version.run for version in Versions(run).all() if version.run]
    assert runs == versions, "each publication has its one line"
    return {
        "killed": killed,
        "attempts": attempts,
        "published_before_death": published_before_death,
        "leftovers": leftovers,
    }


def scored(folder: Path) -> tuple[Path, Path]:
    """Make a run at T = 3, and a store whose pairs are scored and that would make it 1."""
    run, places = prepare(folder)
    for place in (places[1], places[0], places[1]):
        assert work(run, place).verdict == "published"
    return run, places[0]


def no_room(folder: Path) -> dict[str, Any]:
    """Let jobs run into ever larger limits of a file's size, until one publishes."""
    run, place = scored(folder)
    codes, limit = [], 0
    # A reader of the store needs its shared memory, which is a file: let it be there.
    held = sqlite3.connect(place)
    held.execute("SELECT count(*) FROM judgments").fetchone()
    while not codes or codes[-1] != 0:
        before = check(run)

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            work(run, place)

        _, status = os.waitpid(forked(limited), 0)
        codes.append(os.waitstatus_to_exitcode(status))
        assert check(run) == (before if codes[-1] else before + 1)
        limit = max(256, 2 * limit)
    held.close()
    return {"codes": codes, "limit": limit}


def full_disk(folder: Path) -> dict[str, Any]:
    """Fill the file system that the run lies on, but for some kilobytes; `folder` is a mount."""
    run, place = scored(folder)
    ballast = folder / "ballast"
    codes, room = [], 0
    while not codes or codes[-1] != 0:
        before = check(run)
        with ballast.open("wb", buffering=0) as stream, suppress(OSError):
            while stream.write(bytes(4096)):
                pass
        os.truncate(ballast, max(0, ballast.stat().st_size - room))
        _, status = os.waitpid(forked(lambda: work(run, place)), 0)
        codes.append(os.waitstatus_to_exitcode(status))
        ballast.unlink()
        assert check(run) == (before if codes[-1] else before + 1)
        room = max(4096, 2 * room)
    return {"codes": codes, "room": room}


def no_rights(folder: Path) -> dict[str, Any]:
    """Run a job that may read the run and write nothing there."""
    run, place = scored(folder)
    before = check(run)
    for path in (run, *run.rglob("*"), place):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def stripped() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work(run, place)

    _, status = os.waitpid(forked(stripped), 0)
    assert check(run) == before
    code = os.waitstatus_to_exitcode(status)
    for path in (run, *run.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert work(run, place).verdict == "published"
    return {"codes": [code]}


if __name__ == "__main__":
    mode, place, *numbers = sys.argv[1:]
    modes: dict[str, Callable[..., dict[str, Any]]] = {
        "kills": kills,
        "no_room": no_room,
        "full_disk": full_disk,
        "no_rights": no_rights,
    }
    print(json.dumps(modes[mode](Path(place), *map(int, numbers))))
