"""The job: judgments in, a version or a reason out; once, whole, and without a text in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ensemble_rm.evidence.window as window_module
import ensemble_rm.recalibration.job as job_module
from ensemble_rm import Versions, recalibrate
from ensemble_rm.cli.main import main
from ensemble_rm.drift import DriftCheckOptions, check_drift, past_checks
from ensemble_rm.errors import LockedError, StorageError
from ensemble_rm.evidence.score_table import ScoreTable
from ensemble_rm.evidence.window import WindowOptions, choose, read_window
from ensemble_rm.judgments.database.chain import Chain
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress, silent
from ensemble_rm.recalibration import Recalibration, RecalibrationOptions
from tests.support.recalibration_runs import (
    START,
    Loader,
    calibrated,
    fingerprint,
    judged,
    stored,
    write_run,
)

NOW = datetime(2026, 7, 10, tzinfo=UTC)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "hh", 1.0)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("filled") / "judgments.db"
    stored(place, judged(2.0, 3000, seed=1)).close()
    return place


@pytest.fixture
def store(tmp_path: Path, filled: Path) -> Iterator[JudgmentStore]:
    shutil.copyfile(filled, tmp_path / "judgments.db")
    with JudgmentStore.open(tmp_path / "judgments.db") as found:
        yield found


def job(
    run: Path,
    store: JudgmentStore,
    *,
    load: Any = None,
    clock: Any = lambda: NOW,
    progress: Progress = silent,
    **options: Any,
) -> Recalibration:
    chosen = RecalibrationOptions(**{"window": 180.0} | options)
    return recalibrate(
        run, store, options=chosen, load=load or Loader(), clock=clock, progress=progress
    )


def audit(run: Path) -> list[dict[str, Any]]:
    return [event for event in Versions(run).audit.read() if event["event"] == "recalibrated"]


def test_a_planted_temperature_is_published_with_its_provenance(
    run: Path, store: JudgmentStore
) -> None:
    found = job(run, store)
    assert found.verdict == "published", found.reason
    assert (found.incumbent, found.version) == (1, 2)
    version = Versions(run).current()
    assert version.number == 2 and version.ensemble == 1 and version.run == found.run
    calibration = version.read_calibration()
    assert calibration is not None
    assert abs(math.log(calibration.temperature / 2)) < 3 * calibration.fit.log_se
    said = version.provenance
    assert said["judgments"]["digest"] == calibration.digest == store.digest()
    assert said["judgments"]["count"] == 3000
    assert said["judgments"]["first"].startswith("2026-01-01")
    assert said["gate"]["passed"] and said["metrics"]["gate_nll_after"] < 0.7
    assert version.members == Versions(run).show(1).members
    (line,) = audit(run)
    assert line["verdict"] == "published" and line["version"] == 2
    assert line["details"]["members"] == version.members
    assert line["details"]["judgments"] == said["judgments"]


def test_the_same_judgments_twice_publish_once(run: Path, store: JudgmentStore) -> None:
    load = Loader()
    first = job(run, store, load=load)
    found = [job(run, store, load=load) for _ in range(2)]
    assert [one.verdict for one in found] == ["kept", "kept"]
    assert all(first.run in one.reason for one in found)
    assert load.calls == 1
    assert Versions(run).pointer.newest == 2
    # Added in another order, by another store, they are the same.
    other = stored(run.parent / "other.db", judged(2.0, 3000, seed=1)[::-1])
    assert job(run, other, load=load, accept_rewound_store=True).verdict == "kept"
    # A person who rolls back is not overruled by the next run on the same judgments.
    Versions(run).rollback()
    assert job(run, store, accept_rewound_store=True).verdict == "kept"
    assert Versions(run).current().number == 1
    assert len(audit(run)) == 5


def test_scores_are_computed_once(run: Path, store: JudgmentStore) -> None:
    load = Loader()
    job(run, store, load=load)
    store.add(judged(2.0, 40, seed=2, start=180, days=2))
    counted: list[int] = []
    job(
        run,
        store,
        load=load,
        progress=lambda stage, done, _: counted.append(done) if stage == "scoring pairs" else None,
    )
    assert load.calls == 2 and counted == [40]
    # The whole set again, by other options: nothing is scored.
    job(run, store, load=load, delta=0.004)
    assert load.calls == 2


def test_stored_scores_are_those_of_the_ensemble_whichever_side_came_first(
    run: Path, store: JudgmentStore
) -> None:
    job(run, store)
    window = read_window(store, JudgmentFilter(), progress=lambda *_: None)
    table = ScoreTable(run, Versions(run).current().members, read_only=True)
    ((places, sides),) = list(table.blocks(window.keys[:100]))
    by_key = {one.pair_digest: one for one in store.read()}
    ensemble = calibrated(1.0)
    for place, pair in zip(places, sides, strict=True):
        one = by_key[window.keys[place].ljust(16, b"\0")]
        texts = sorted([(one.text_digests[1], one.first), (one.text_digests[2], one.second)])
        expected = [float(text.split()[-1]) for _, text in texts]
        np.testing.assert_allclose(pair[:, 0], expected)
        np.testing.assert_allclose(pair[:, 1], np.array(expected) + 1)
    assert ensemble.names == ("a", "b")


def test_a_dry_run_says_everything_and_writes_nothing(run: Path, store: JudgmentStore) -> None:
    before = fingerprint(run.parent)
    found = job(run, store, dry_run=True)
    assert found.verdict == "published" and found.dry_run and found.version == 2
    assert fingerprint(run.parent) == before
    real = job(run, store)
    assert real.temperature_after == found.temperature_after
    before = fingerprint(run.parent)
    assert job(run, store, dry_run=True, delta=1.0).dry_run
    assert fingerprint(run.parent) == before


def test_too_few_judgments_are_said_and_remembered(run: Path, tmp_path: Path) -> None:
    store = stored(tmp_path / "few.db", judged(2.0, 60, seed=1))
    for _ in range(2):
        found = job(run, store)
        assert found.verdict == "too few" and "needs 50" in found.reason
    empty = stored(tmp_path / "none.db")
    assert job(run, empty, accept_rewound_store=True).verdict == "too few"
    assert Versions(run).current().number == 1


def test_a_pinned_version_stays_and_the_next_run_after_it_publishes(
    run: Path, store: JudgmentStore
) -> None:
    Versions(run).adopt()
    Versions(run).pin()
    found = job(run, store)
    assert found.verdict == "kept" and "pinned" in found.reason
    Versions(run).unpin()
    assert job(run, store).verdict == "published"


def test_windows_go_back_from_the_newest_judgment_and_not_from_the_clock(
    store: JudgmentStore,
) -> None:
    found = [
        choose(store, WindowOptions(window=30.0), latest=latest)[0]
        for latest in (NOW, NOW + timedelta(days=500))
    ]
    assert found[0] == found[1]
    window = read_window(store, found[0], progress=lambda *_: None)
    assert 499 <= len(window) <= 501


def test_judgments_dated_after_the_clock_are_left_out_and_counted(
    run: Path, store: JudgmentStore
) -> None:
    store.add(judged(9.0, 30, seed=7, start=365 * 70, days=1))
    found = job(run, store)
    assert found.verdict == "published"
    assert found.details["judgments"]["future"] == 30
    assert found.details["judgments"]["count"] == 3000


def test_a_clock_that_goes_back_leaves_no_judgment_out(run: Path, store: JudgmentStore) -> None:
    assert job(run, store).version == 2
    store.add(judged(2.0, 300, seed=3, start=150, days=30))
    found = job(run, store, clock=lambda: START - timedelta(days=4000))
    assert found.details["judgments"]["future"] == 0
    assert found.details["judgments"]["count"] == 3300
    assert found.verdict in ("published", "kept")


def test_another_job_is_said_or_waited_for(run: Path, store: JudgmentStore) -> None:
    with Versions(run).lock():
        with pytest.raises(LockedError, match="another process is working"):
            job(run, store)
        assert job(run, store, dry_run=True).verdict == "published"
    assert job(run, store, wait=True).verdict == "published"


def test_an_error_is_a_line_in_the_log_and_leaves_the_incumbent(
    run: Path, store: JudgmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ensemble_rm.versions.repository.write_file", failing)
        with pytest.raises(StorageError, match="No space left"):
            job(run, store)
    assert not Versions(run).versioned
    Versions(run).adopt()
    with monkeypatch.context() as patch:
        patch.setattr("ensemble_rm.versions.repository.sync_tree", failing)
        with pytest.raises(StorageError, match="No space left"):
            job(run, store)
    assert Versions(run).current().number == 1
    assert [line["verdict"] for line in audit(run)] == ["error", "error"]
    assert job(run, store).verdict == "published"


def test_the_line_of_a_run_killed_after_publishing_is_written_by_the_next(
    run: Path, store: JudgmentStore
) -> None:
    first = job(run, store)
    lines = (run / "audit.jsonl").read_text().splitlines(keepends=True)
    (run / "audit.jsonl").write_text("".join(lines[:-1]))
    second = job(run, store)
    assert second.verdict == "kept"
    found = audit(run)
    assert [line["run"] for line in found] == [first.run, second.run]
    assert found[0]["repaired"] and found[0]["version"] == 2


def test_active_judgments_count_by_their_inclusion(run: Path, tmp_path: Path) -> None:
    """Pairs picked for their small margins tell the temperature as well, if they are weighted."""
    drawn = judged(2.0, 6000, seed=5)
    rng = np.random.default_rng(0)
    picked = []
    for one in drawn:
        size = abs(float(one.first.split()[-1]) - float(one.second.split()[-1]))
        inclusion = 0.9 if size < 1 else 0.3
        if rng.random() < inclusion:
            picked.append(
                replace(one, inclusion=inclusion, strategy="margin", batch="b", external_id="")
            )
    found = job(run, stored(tmp_path / "picked.db", picked))
    size = found.details["sizes"]["window"]
    assert size["effective"] < size["judgments"] == len(picked)
    assert found.verdict == "published"
    assert found.temperature_after == pytest.approx(2.0, rel=0.15)


def test_the_command_says_its_verdict_by_its_exit_code(
    run: Path, store: JudgmentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(run, store)  # which scores the pairs
    Versions(run).rollback()
    place = str(tmp_path / "judgments.db")
    first = ["recalibrate", str(run), "--judgments", place, "--until", "2026-06-29"]
    # The machine's clock may be years after the judgments and the run above.
    assert main([*first, "--accept-clock"]) == 0
    assert "published version 3" in capsys.readouterr().out
    command = ["recalibrate", str(run), "--judgments", place, "--until", "2026-06-29", "--json"]
    assert main(command) == 10
    assert json.loads(capsys.readouterr().out)["verdict"] == "kept"
    assert main([*command[:4], "--until", "2026-01-03"]) == 11
    with Versions(run).lock():
        assert main(command) == 13
    assert main([*command, "--window", "30d", "--gate-share", "2"]) == 2
    assert main(["recalibrate", str(run), "--judgments", str(tmp_path / "no.db")]) == 4
    capsys.readouterr()


def test_the_commands_of_versions(
    run: Path, store: JudgmentStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["versions", "list", str(run)]) == 0
    assert "no versions yet" in capsys.readouterr().out
    assert main(["versions", "rollback", str(run)]) == 4
    job(run, store)
    assert main(["versions", "list", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["current"] == 2 and [v["number"] for v in said["versions"]] == [1, 2]
    assert main(["versions", "show", str(run), "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "ensemble"
    assert main(["versions", "show", str(run)]) == 0
    assert '"gate"' in capsys.readouterr().out
    assert main(["versions", "rollback", str(run)]) == 0
    assert main(["versions", "pin", str(run), "2"]) == 0
    assert main(["versions", "list", str(run)]) == 0
    assert "p    2" in capsys.readouterr().out
    assert main(["versions", "rollback", str(run)]) == 4
    assert main(["versions", "unpin", str(run)]) == 0
    assert main(["versions", "rollback", str(run), "--to", "9"]) == 4
    assert "versions 1 to 2, but not 9" in capsys.readouterr().err


def test_drift_that_the_gate_cannot_answer_is_an_alarm_until_something_better_is_published(
    run: Path, store: JudgmentStore
) -> None:
    assert job(run, store).version == 2
    # Verdicts turn to coins: no temperature answers that, and the next batch does not confirm it.
    store.add(judged(40.0, 400, seed=11, start=181, days=6))
    found = job(run, store)
    assert found.verdict == "drift alarm" and "overconfident" in found.reason
    assert found.alarm is not None and found.alarm["alarm"]
    assert Versions(run).current().number == 2
    again = job(run, store, delta=0.004)
    assert again.verdict == "drift alarm"
    assert again.alarm is not None and again.alarm["prompts"] == found.alarm["prompts"]


def test_votes_that_contradict_the_margins_flatten_and_alarm_until_it_is_retrained(
    run: Path, tmp_path: Path
) -> None:
    turned = {"first": "second", "second": "first"}
    votes = [replace(one, outcome=turned[one.outcome]) for one in judged(1.0, 900, seed=21)]
    with stored(tmp_path / "turned.db", votes) as store:
        found = job(run, store)
        assert found.verdict == "drift alarm" and found.version == 2
        assert found.temperature_after is not None and found.temperature_after > 10
        assert "retrain" in found.reason and Versions(run).current().number == 2
        again = job(run, store)
        assert (again.verdict, again.version) == ("drift alarm", None)
        assert "retrain" in again.reason
        assert audit(run)[0]["verdict"] == "drift alarm"


def test_a_drift_check_reports_three_kinds_and_its_exit_code(
    run: Path, store: JudgmentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(run, store)
    for month in range(3):
        anchors = judged(2.0, 30, seed=50, start=60 * month, days=20, batch="anchors")
        store.add(replace(one, annotator="ann", external_id="") for one in anchors)
    store.add(judged(2.0, 200, seed=12, start=181, days=5))
    scored: dict[str, Any] = {"load": Loader(), "clock": lambda: NOW}
    assert check_drift(run, store, options=DriftCheckOptions(dry_run=True), **scored).alarms == ()
    assert not past_checks(run)
    report = check_drift(run, store, options=DriftCheckOptions(anchors=("anchors",)), **scored)
    assert report.alarms == () and not report.unavailable
    assert report.labelled is not None and 150 < report.labelled.prompts <= 200
    assert report.unlabelled is not None and report.raters is not None
    assert past_checks(run) == [report]
    store.add(judged(40.0, 600, seed=13, start=187, days=3))
    assert check_drift(run, store, **scored).alarms == ("labelled",)
    picture = tmp_path / "drift.png"
    command = ["drift", str(run), "--judgments", str(tmp_path / "judgments.db"), "--json"]
    assert main([*command, f"--report={picture}", "--accept-clock"]) == 12
    said = json.loads(capsys.readouterr().out)
    assert said["alarms"] == ["labelled"] and "anchor set" in said["unavailable"]["raters"]
    assert picture.stat().st_size > 1000


def test_both_databases_are_read_alike(run: Path, store_place: str) -> None:
    with stored(store_place, judged(3.0, 1500, seed=3)) as store:
        found = job(run, store)
        assert found.verdict == "published", found.reason
        assert found.details["judgments"]["digest"] == store.digest()
        first = min(one.judged_at for one in store.read())
        assert found.details["judgments"]["first"] == first.isoformat(timespec="seconds")
        assert store.newest() == max(one.judged_at for one in store.read())


def test_an_account_that_inverts_is_left_out_listed_and_excluded(
    run: Path, store: JudgmentStore
) -> None:
    inverted = {"first": "second", "second": "first"}
    bad = [
        replace(j, outcome=inverted[j.outcome], annotator="mallory", external_id="")
        for j in judged(2.0, 800, seed=9, days=1 / 24, start=179.9)
    ]
    store.add(bad)
    found = job(run, store, dry_run=True)
    assert found.verdict == "published" and "left out" in found.reason
    assert found.details["annotators"]["rejected"] == ["mallory"]
    assert abs(math.log(found.temperature_after / 2.0)) < 0.15  # type: ignore[operator]
    without = job(run, store, exclude_annotator=("mallory",), dry_run=True)
    assert without.details["annotators"]["rejected"] == []
    assert without.details["judgments"]["count"] == 3000
    assert job(run, store, only_source=("nothing",), dry_run=True).verdict == "too few"


def test_too_many_rejected_annotators_are_an_alarm_and_publish_nothing(
    run: Path, store: JudgmentStore
) -> None:
    inverted = {"first": "second", "second": "first"}
    store.add(
        replace(j, outcome=inverted[j.outcome], annotator="mallory", external_id="")
        for j in judged(2.0, 800, seed=9)
    )
    for _ in range(2):  # a repeated run says so again
        found = job(run, store, max_rejected=0.0)
        assert found.verdict == "drift alarm" and found.version is None
        assert "mallory" in found.reason
        assert audit(run)[-1]["verdict"] == "drift alarm"


def test_a_day_of_arrival_is_capped_until_the_operator_trusts_its_batch(
    run: Path, store: JudgmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A later day, on which as many judgments arrive again by many annotators.
    late = [
        replace(j, annotator=f"late {i % 50}", external_id="")
        for i, j in enumerate(judged(2.0, 3000, seed=21))
    ]
    real = window_module.arrival_days

    def days_later(chain: Chain, trusted: Collection[int] = ()) -> dict[int, int]:
        links = [
            link._replace(appended_at=START + timedelta(days=200 + link.number))
            for link in chain.links
        ]
        return real(Chain(tuple(links)), trusted)

    store.add(late)
    monkeypatch.setattr(window_module, "arrival_days", days_later)
    monkeypatch.setattr(job_module, "arrival_days", days_later)
    found = job(run, store, dry_run=True)
    batch = found.details["capped_batches"]
    assert len(batch) == 1 and f"batches {batch[0]} of the store were reduced" in found.reason
    trusted = job(run, store, trust_batch=tuple(batch), dry_run=True)
    assert "capped_batches" not in trusted.details and "reduced" not in trusted.reason
    assert list(trusted.details["options"]["trust_batch"]) == batch
    assert trusted.details["key"] != found.details["key"]
