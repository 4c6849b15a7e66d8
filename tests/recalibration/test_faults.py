"""The job under real faults: real processes, real signals, real limits; the incumbent stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm import Versions, recalibrate
from ensemble_rm.recalibration import RecalibrationOptions
from tests.support import CHECKOUT, SUPPORT
from tests.support.recalibration_runs import Loader, judged, stored, write_run

pytestmark = pytest.mark.slow
DRIVER = SUPPORT / "recalibration_driver.py"


def drive(mode: str, folder: Path, *numbers: int) -> tuple[dict[str, Any], str]:
    """Run the driver; return its findings, and what its jobs said."""
    command = [sys.executable, str(DRIVER), mode, str(folder), *map(str, numbers)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )
    assert done.returncode == 0, done.stderr
    *said, found = done.stdout.splitlines()
    return json.loads(found), "\n".join(said)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that a user without rights may enter; pytest's own are its owner's."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_200_kills_leave_a_readable_version_and_the_next_run_completes(tmp_path: Path) -> None:
    found, _ = drive("kills", tmp_path, 200, 0)
    assert found["killed"] == 200
    # Some fell where it hurts: with half a version written.
    assert found["leftovers"] > 0
    assert found["attempts"] > 0


def test_a_limit_on_the_size_of_files_is_a_named_error(tmp_path: Path) -> None:
    found, said = drive("no_room", tmp_path)
    *codes, last = found["codes"]
    assert last == 0 and len(codes) > 3 and set(codes) == {4}
    assert "publishing in" in said and "File too large" in said


def test_a_full_disk_is_a_named_error(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small file system")
    try:
        found, said = drive("full_disk", place)
    finally:
        subprocess.run(["umount", str(place)], check=True)
    *codes, last = found["codes"]
    assert last == 0 and codes and set(codes) == {4}
    assert "No space left on device" in said or "full" in said


def test_a_folder_that_may_not_be_written_is_a_named_error(open_folder: Path) -> None:
    found, said = drive("no_rights", open_folder)
    assert found["codes"] == [4]
    assert "Permission denied" in said and "the current version is unchanged" in said


def command(run: Path, place: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "ensemble_rm", "recalibrate", str(run), "--json"),
        *("--judgments", str(place), "--gate-share", "0.3", "--delta", "0.05", *more),
    ]


def test_of_two_jobs_at_once_one_publishes_and_the_other_says_so(tmp_path: Path) -> None:
    run, place = write_run(tmp_path / "hh", 1.0), tmp_path / "judgments.db"
    with stored(place, judged(3.0, 1200, seed=3)) as store:
        # The commands cannot load members that are functions: their scores are stored.
        recalibrate(run, store, load=Loader(), options=RecalibrationOptions(min_judgments=10_000))
    with Versions(run).lock():
        busy = subprocess.run(command(run, place), capture_output=True, text=True, check=False)
        assert busy.returncode == 13, busy.stderr
        assert json.loads(busy.stdout)["error"] == "LockedError"
        waiting = [
            subprocess.Popen(command(run, place, "--wait"), stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        with pytest.raises(subprocess.TimeoutExpired):
            waiting[0].wait(timeout=5)
    said = [json.loads(process.communicate()[0]) for process in waiting]
    assert sorted(process.returncode for process in waiting) == [0, 10]
    assert sorted(one["verdict"] for one in said) == ["kept", "published"]
    assert Versions(run).current().number == 2
