"""An erasure reaches what the jobs derived from a text, and lists the versions that it trained."""

from __future__ import annotations

import json
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_rm import Versions, recalibrate
from ensemble_rm.cli.main import main
from ensemble_rm.evidence.erasure import TrainedVersion, erase_judgments
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.recalibration import Recalibration, RecalibrationOptions
from ensemble_rm.scoring import ScoreCache
from tests.support.recalibration_runs import Loader, judged, stored, write_run

NOW = datetime(2026, 7, 10, tzinfo=UTC)
ROWS = judged(2.0, 1200, seed=1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "hh", 1.0)


@pytest.fixture
def store(tmp_path: Path) -> JudgmentStore:
    return stored(tmp_path / "judgments.db", ROWS)


def job(run: Path, store: JudgmentStore, **options: Any) -> Recalibration:
    chosen = RecalibrationOptions(**options)
    return recalibrate(run, store, options=chosen, load=Loader(), clock=lambda: NOW)


def scored_pairs(run: Path) -> set[bytes]:
    (path,) = (run / "scores").glob("*.sqlite")
    with sqlite3.connect(path) as db:
        pairs = {pair for (pair,) in db.execute("SELECT pair FROM scores")}
    db.close()
    return pairs


def test_scores_are_deleted_and_the_trained_version_is_named(
    run: Path, store: JudgmentStore, tmp_path: Path
) -> None:
    assert job(run, store).version == 2
    cache = ScoreCache(tmp_path / "cache")
    cache.put([b"k" * 32], np.ones((1, 3)))
    (run / ".retraining-0").mkdir()
    erased = ROWS[700]
    for dry_run in (True, False):
        found = erase_judgments(
            store, [erased.id], runs=[run], caches=[tmp_path / "cache"], dry_run=dry_run
        )
        assert (found.judgments, found.shared, found.texts) == ((erased.id,), (), 3)
        assert found.scores == 1
        assert found.versions == (
            TrainedVersion(run=str(run), version=2, kind="calibration", certain=True),
        )
        assert found.files == (str(run / ".retraining-0"), str(cache.path))
        assert (erased.pair_digest in scored_pairs(run)) == dry_run
        assert cache.path.exists() == (run / ".retraining-0").exists() == dry_run
    assert scored_pairs(run) == {one.pair_digest for one in ROWS} - {erased.pair_digest}
    again = job(run, store)  # the chain still fits, and the judgment is not read
    assert again.details["judgments"]["count"] == 1199


def test_versions_that_did_not_read_a_judgment_are_not_named(
    run: Path, store: JudgmentStore
) -> None:
    """One outside the window, one that came later, and one that was corrected before the run."""
    corrected = ROWS[900]
    store.add([corrected.corrected("tie", judged_at=corrected.judged_at + timedelta(minutes=1))])
    assert job(run, store, window=90.0).version == 2
    late = judged(2.0, 1, seed=9, start=170, days=1)
    store.add(late)
    for one, named in ((ROWS[5], False), (late[0], False), (ROWS[901], True)):
        found = erase_judgments(store, [one.id], runs=[run], dry_run=True)
        assert bool(found.versions) == named
    # The correction shares its texts, and the run read it.
    found = erase_judgments(store, [corrected.id], runs=[run], dry_run=True)
    assert len(found.judgments) == 2 and found.versions


def test_a_version_of_an_earlier_release_is_named_with_a_doubt(
    run: Path, store: JudgmentStore
) -> None:
    job(run, store)
    path = run / "versions" / "0002" / "version.json"
    row = json.loads(path.read_text())
    del row["provenance"]["judgments"]["chain"]
    del row["sha256"]  # earlier releases did not seal the file
    path.write_text(json.dumps(row))
    (entry,) = erase_judgments(store, [ROWS[700].id], runs=[run], dry_run=True).versions
    assert entry.version == 2 and not entry.certain


def test_the_command_lists_and_erases_only_with_yes(
    run: Path, store: JudgmentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job(run, store)
    place, erased = str(tmp_path / "judgments.db"), ROWS[700].id
    words = ["judgments", "erase", place, erased, "--run", str(run), "--cache-dir", str(tmp_path)]
    assert main(words) == 0
    heard = capsys.readouterr()
    assert "would be erased" in heard.out and "calibration 2" in heard.out
    assert "repeat the command with --yes" in heard.err
    assert store.count() == 1200
    assert main([*words, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["judgments"] == [erased]
    assert store.count() == 1199
    assert main(["judgments", "erase", place, "0" * 32, "--yes"]) == 3
    assert Versions(run).current().number == 2
