"""A job knows the store that it read before, and does not take a clock's word for the time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm import Versions, recalibrate
from ensemble_rm.cli.main import main
from ensemble_rm.drift import DriftCheckOptions, check_drift
from ensemble_rm.errors import ClockError, StoreIntegrityError, VersionError
from ensemble_rm.judgments.backup import backup_store
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.recalibration import Recalibration, RecalibrationOptions
from tests.support.recalibration_runs import START, Loader, judged, stored, write_run
from tests.support.tampering import tamper

NOW = datetime(2026, 7, 10, tzinfo=UTC)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "hh", 1.0)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("filled") / "judgments.db"
    stored(place, judged(2.0, 1200, seed=1)).close()
    return place


@pytest.fixture
def place(tmp_path: Path, filled: Path) -> Path:
    shutil.copyfile(filled, tmp_path / "judgments.db")
    return tmp_path / "judgments.db"


def job(
    run: Path, place: Path, *, clock: Callable[[], datetime] = lambda: NOW, **options: Any
) -> Recalibration:
    chosen = RecalibrationOptions(**{"window": 180.0} | options)
    with JudgmentStore.open(place) as store:
        return recalibrate(run, store, options=chosen, load=Loader(), clock=clock)


def add(place: Path, n: int, *, seed: int, start: float = 170.0, t: float = 2.0) -> None:
    with JudgmentStore.open(place) as store:
        store.add(judged(t, n, seed=seed, start=start, days=5))


def lines(run: Path) -> list[dict[str, Any]]:
    return [event for event in Versions(run).audit.read() if event["event"] == "recalibrated"]


# A store that was rewound -------------------------------------------------------------------------


def test_a_run_logs_the_chain_that_it_read(run: Path, place: Path) -> None:
    job(run, place)
    with JudgmentStore.open(place) as store:
        chain = store.chain()
    known = lines(run)[-1]["details"]["judgments"]["chain"]
    assert known == {"head": chain.head, "judgments": 1200, "links": len(chain.links)}


def test_changed_outcomes_publish_nothing(run: Path, place: Path) -> None:
    """The fault as it was seen: triggers dropped, outcomes flipped, T of 362.7 published."""
    flip = "UPDATE judgments SET outcome = CASE outcome WHEN 'first' THEN 'second' ELSE 'first' END"
    tamper(str(place), flip)
    with pytest.raises(StoreIntegrityError, match="was changed by hand"):
        job(run, place)
    assert [line["verdict"] for line in lines(run)] == ["error"]
    assert Versions(run).current().number == 1


def test_an_older_backup_is_refused_until_it_is_accepted(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup_store(place, tmp_path / "backup.db")
    add(place, 100, seed=4)
    assert job(run, place).verdict == "published"
    add(place, 100, seed=5)
    assert job(run, place).details["judgments"]["chain"]["judgments"] == 1400  # grown, not rewound
    for leftover in place.parent.glob("judgments.db*"):
        leftover.unlink()
    shutil.copyfile(tmp_path / "backup.db", place)
    before = Versions(run).current().number
    for _ in range(2):  # a refused run does not accept the store for the next
        with pytest.raises(StoreIntegrityError, match=r"--accept-rewound-store"):
            job(run, place)
        with pytest.raises(StoreIntegrityError, match="lacks judgments that run"):
            job(run, place, dry_run=True)
    with JudgmentStore.open(place) as store, pytest.raises(StoreIntegrityError):
        check_drift(run, store, options=DriftCheckOptions(), load=Loader(), clock=lambda: NOW)
    assert Versions(run).current().number == before
    capsys.readouterr()
    assert main(["recalibrate", str(run), "--judgments", str(place), "--json"]) == 15
    assert json.loads(capsys.readouterr().out)["error"] == "StoreIntegrityError"
    accepted = job(run, place, accept_rewound_store=True)
    assert accepted.details["accepted_rewound_store"]
    assert "accepted_rewound_store" not in job(run, place).details


def test_lost_judgments_are_refused_even_with_the_flag(run: Path, place: Path) -> None:
    job(run, place)
    tamper(str(place), "DELETE FROM judgments WHERE judged_at < '2026-02'")
    with pytest.raises(StoreIntegrityError, match=r"had 1200 judgments and has"):
        job(run, place, accept_rewound_store=True)


# Clocks -------------------------------------------------------------------------------------------


def test_a_run_far_ahead_is_refused_until_it_is_accepted(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(run, place)
    later = NOW + timedelta(days=91)
    for _ in range(2):  # the line of a refused run is not the last run
        with pytest.raises(ClockError, match=r"91 days ahead of both .*--accept-clock"):
            job(run, place, clock=lambda: later)
    assert job(run, place, clock=lambda: NOW + timedelta(days=89)).verdict == "kept"
    log = run / "audit.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:-1]))
    assert job(run, place, clock=lambda: later, max_clock_lead=92.0).verdict == "kept"
    capsys.readouterr()
    log.write_text(log.read_text().replace(later.isoformat(), "2020-01-01T00:00:00+00:00"))
    words = ["recalibrate", str(run), "--judgments", str(place), "--dry-run"]
    assert main([*words, "--max-clock-lead", "0.001"]) == 5  # the machine's own clock
    assert "--accept-clock" in capsys.readouterr().err
    assert main([*words, "--max-clock-lead", "0.001", "--accept-clock"]) in (0, 10)


def test_the_newest_judgment_vouches_for_the_clock(run: Path, place: Path) -> None:
    job(run, place)
    later = NOW + timedelta(days=200)
    add(place, 50, seed=6, start=(later - START).days - 10)
    assert "clock" not in job(run, place, clock=lambda: later).details


def test_the_first_run_takes_its_clock_as_it_is(run: Path, place: Path) -> None:
    assert job(run, place, clock=lambda: NOW + timedelta(days=4000)).verdict == "published"


def test_one_run_far_ahead_does_not_poison_the_next(run: Path, place: Path) -> None:
    """Its line's clock is not taken for the time: judgments dated after now stay left out."""
    job(run, place)
    far = job(run, place, clock=lambda: NOW + timedelta(days=9000), accept_clock=True)
    assert "accepted" in far.details["clock"]
    add(place, 30, seed=7, start=4000, t=9.0)  # dated years ahead
    found = job(run, place)
    assert found.details["judgments"]["future"] == 30
    assert f"earlier than that of run {far.run}" in found.details["clock"]
    assert "withdraw-run" in str(found)


def test_a_withdrawn_run_is_out_of_account_and_stays_in_the_log(
    run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a clock far ahead a job accepted judgments of the future; that is undone."""
    job(run, place)
    add(place, 30, seed=7, start=4000)
    far = job(run, place, clock=lambda: NOW + timedelta(days=9000), accept_clock=True)
    assert far.details["judgments"]["future"] == 0
    poisoned = job(run, place)
    assert poisoned.details["judgments"]["future"] == 0  # known since the run far ahead
    assert main(["versions", "withdraw-run", str(run), far.run]) == 0
    assert main(["versions", "withdraw-run", str(run), poisoned.run]) == 0
    found = job(run, place)
    assert found.details["judgments"]["future"] == 30
    assert "clock" not in found.details
    assert {far.run, poisoned.run} < {line["run"] for line in lines(run)}
    for name, said in ((far.run, "withdrawn already"), ("nothing", "has no run 'nothing'")):
        with pytest.raises(VersionError, match=said):
            Versions(run).withdraw_run(name)


def test_withdrawing_a_publication_names_its_version(run: Path, place: Path) -> None:
    found = job(run, place)
    assert found.verdict == "published"
    version = Versions(run).withdraw_run(found.run)
    assert version is not None and version.number == found.version
    assert job(run, place).verdict == "kept"  # the log is not repaired with a second line
    assert [line["run"] for line in lines(run)].count(found.run) == 1
