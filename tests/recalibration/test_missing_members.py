"""Recalibration with members that fail: tried again, never nought, and no job stops for one."""

from __future__ import annotations

import zlib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_rm import FunctionScorer, RewardEnsemble, Sample
from ensemble_rm.aggregation import make_aggregator
from ensemble_rm.drift import DriftCheckOptions, check_drift
from ensemble_rm.evidence.dated_margins import evidence_of
from ensemble_rm.evidence.score_table import ScoreTable
from ensemble_rm.evidence.window import read_window
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.recalibration import RecalibrationOptions
from ensemble_rm.recalibration.job import recalibrate
from ensemble_rm.versions.repository import Versions
from tests.support.recalibration_runs import calibrated, judged, score_of, stored, write_run

NOW = datetime(2026, 7, 10, tzinfo=UTC)
OPTIONS = RecalibrationOptions(window=400.0)
CHECK = DriftCheckOptions(window=400.0)
OMIT = make_aggregator("mean", nan="omit")


class Failing:
    """Loads an ensemble whose second member fails for a share of the texts, until it is mended."""

    def __init__(self) -> None:
        self.mended = False
        self.first = False  # whether the first member is out altogether
        self.calls = 0

    def __call__(self, folder: Path, *, version: int | None = None) -> RewardEnsemble:
        assert folder.is_dir() and version in (None, 1)
        self.calls += 1
        ensemble = calibrated(1.0, aggregator=OMIT)

        def score(sample: Sample) -> float:
            failed = not self.mended and zlib.crc32(sample.completion.encode()) % 25 == 0
            return float("nan") if failed else score_of(sample) + 1.0

        first = FunctionScorer("a", lambda s: float("nan")) if self.first else ensemble.scorers[0]
        return replace(ensemble, scorers=(first, FunctionScorer("b", score)))


def test_a_pair_that_nobody_can_score_stops_no_job(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1.0, aggregator=OMIT)
    store = stored(tmp_path / "judgments.db", judged(2.0, 3000, seed=1))
    bad = next(store.read()).first

    def load(_: Path, *, version: int | None = None) -> RewardEnsemble:
        ensemble = calibrated(1.0, aggregator=OMIT)
        rejecting = [
            FunctionScorer(name, lambda s: float("nan") if s.completion == bad else score_of(s))
            for name in "ab"
        ]
        return replace(ensemble, scorers=tuple(rejecting))

    given: dict[str, Any] = {"load": load, "clock": lambda: NOW}
    found = recalibrate(run, store, options=OPTIONS, **given)
    assert found.verdict == "published"
    judgments = found.details["judgments"]
    assert (judgments["count"], judgments["unscored"]) == (2999, 1)
    assert check_drift(run, store, options=CHECK, **given).labelled is not None


def test_a_failure_is_tried_again_by_the_next_job_and_is_never_nought(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1.0, aggregator=OMIT)
    store = stored(tmp_path / "judgments.db", judged(2.0, 3000, seed=1))
    load = Failing()
    given: dict[str, Any] = {"load": load, "clock": lambda: NOW}
    first = recalibrate(run, store, options=OPTIONS, **given)
    assert first.verdict == "published"
    window = read_window(store, JudgmentFilter(), progress=lambda *_: None)
    table = ScoreTable(run, Versions(run).current().members, read_only=True)
    ((_, sides),) = table.blocks(window.keys)
    holes = np.isnan(sides[..., 1])
    assert holes.any() and np.isfinite(sides[..., 0]).all()
    evidence = evidence_of(window, table)
    assert evidence is not None
    assert int(np.isnan(evidence.first).sum() + np.isnan(evidence.second).sum()) == holes.sum()
    store.add(judged(2.0, 200, seed=2, start=181, days=5))
    report = check_drift(run, store, options=CHECK, **given)
    assert report.unlabelled is not None  # over the samples that every member scored

    load.first = True  # now the other fails, and what was stored of the second stays
    store.add(judged(2.0, 20, seed=3, start=187, days=1))
    recalibrate(run, store, options=OPTIONS, **given)
    ((_, both),) = table.blocks(window.keys)
    assert np.isfinite(both[~holes, 1]).all() and np.isnan(both[holes, 1]).all()
    assert np.isfinite(both[..., 0]).all()

    load.mended, load.calls, load.first = True, 0, False
    store.add(judged(2.0, 20, seed=4, start=188, days=1))
    recalibrate(run, store, options=OPTIONS, **given)
    ((_, mended),) = table.blocks(window.keys)
    assert load.calls == 1
    np.testing.assert_allclose(mended[..., 1], mended[..., 0] + 1)
    load.calls = 0
    check_drift(run, store, options=DriftCheckOptions(window=400.0, dry_run=True), **given)
    assert load.calls == 0
