"""Distance to the training inputs, from training through the versions to `drift`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from ensemble_rm import FunctionScorer, RewardEnsemble, Sample, Versions, recalibrate, train
from ensemble_rm.drift.check import check_drift
from ensemble_rm.errors import ScoringError
from ensemble_rm.members import HeadRecipe, scorer_features
from ensemble_rm.scoring import ScoreCache
from ensemble_rm.uncertainty import fit_feature_space
from tests.support.recalibration_runs import calibrated, judged, score_of, stored, write_run
from tests.support.small_runs import OPTIONS, SAMPLES, few_pairs

NOW = datetime(2026, 7, 10, tzinfo=UTC)


class Wordy(FunctionScorer):
    """A member that reads its score off the text, and exposes features: words, and six more."""

    def features(self, samples: Sequence[Sample]) -> np.ndarray:
        rows = []
        for sample in samples:
            rng = np.random.default_rng(crc32(sample.completion.encode()))
            rows.append([len(sample.completion.split()) + rng.normal(), *rng.normal(size=6)])
        return np.array(rows)


def loaded(*_: Any, **__: Any) -> RewardEnsemble:
    """An ensemble that knows where its training inputs lie: completions of three words."""
    member = Wordy("wordy", score_of)
    training = [Sample("p", f"I say {i}") for i in range(400)]
    space = fit_feature_space(member.features(training))
    whole = calibrated(1.0)
    return replace(whole, scorers=(member, whole.scorers[1]), feature_space=space)


def test_a_check_compares_distances_with_those_stored_with_the_version(tmp_path: Path) -> None:
    run = write_run(tmp_path / "hh", 1.0)
    given: dict[str, Any] = {"load": loaded, "clock": lambda: NOW}
    with stored(tmp_path / "judgments.db", judged(2.0, 1200, seed=1)) as store:
        assert recalibrate(run, store, **given).version == 2
        evidence = Versions(run).current().read_calibration()
        assert evidence is not None
        store.add(judged(2.0, 150, seed=2, start=181, days=4))
        same = check_drift(run, store, **given)
        assert same.unlabelled is not None and same.alarms == ()
        assert "distance" in [shift.name for shift in same.unlabelled.shifts]
        # The same scores and verdicts, of texts that no member was trained on.
        padded = [
            replace(one, first=f"{'word ' * 6}{one.first}", second=f"{'word ' * 6}{one.second}")
            for one in judged(2.0, 150, seed=3, start=186, days=3)
        ]
        store.add(padded)
        found = check_drift(run, store, **given)
    assert found.unlabelled is not None
    assert [shift.name for shift in found.unlabelled.shifts if shift.alarm] == ["distance"]


def test_scores_without_distances_leave_the_others_to_be_tested(tmp_path: Path) -> None:
    """An ensemble that was trained before there were feature spaces."""
    run = write_run(tmp_path / "hh", 1.0)
    given: dict[str, Any] = {"load": lambda *_, **__: calibrated(1.0), "clock": lambda: NOW}
    with stored(tmp_path / "judgments.db", judged(2.0, 1200, seed=1)) as store:
        assert recalibrate(run, store, **given).version == 2
        store.add(judged(2.0, 150, seed=2, start=181, days=4))
        found = check_drift(run, store, **given).unlabelled
    assert found is not None and "Scorer.features" in found.unavailable["distance"]
    assert [shift.name for shift in found.shifts] == ["reward", "std", "correlation"]


def test_a_distance_asks_no_member_without_features_and_a_score_asks_it_once(
    tmp_path: Path,
) -> None:
    asked: list[int] = []

    class Dear(FunctionScorer):  # such as a judge
        def score(self, samples: Sequence[Sample]) -> np.ndarray:
            asked.append(len(samples))
            return super().score(samples)

    whole = loaded()
    ensemble = replace(whole, scorers=(whole.scorers[0], Dear("dear", score_of)))
    samples = [Sample("p", f"I say {i}") for i in range(5)]
    ensemble.distance(samples)
    assert not asked
    for one in (ensemble, ensemble.with_score_cache(ScoreCache(tmp_path))):
        asked.clear()
        far = one.score(samples, distance=True).distance
        assert asked == [5] and far is not None
        np.testing.assert_array_equal(far, ensemble.distance(samples))


def test_training_keeps_where_its_inputs_lie(small_folder: Path, tmp_path: Path) -> None:
    fit, validation = few_pairs(160)
    held = validation
    ensemble = train(
        *(fit, validation),
        backbone=small_folder,
        members=2,
        recipe=HeadRecipe(views=("1:mean", "2:both")),
        options=OPTIONS,
        out=tmp_path / "run",
        cache_dir=None,
    )
    near, far = ensemble.distance(fit.samples()), ensemble.distance(SAMPLES)
    assert 0.4 < float(np.sqrt((near**2).mean())) < 1.2  # shrunk: below 1 on its own samples
    read = RewardEnsemble.from_pretrained(tmp_path / "run", cache_dir=None)
    assert (read.distance(SAMPLES) == far).all()
    both = read.score(SAMPLES, distance=True)
    assert both.distance is not None and (both.distance == far).all()
    assert (both.members == read.score(SAMPLES).members).all()
    features = scorer_features(read.scorers, SAMPLES)
    assert features is not None and read.feature_space is not None
    assert read.feature_space.distance(features) == pytest.approx(far, rel=1e-9)
    cached = read.with_score_cache(ScoreCache(tmp_path / "cache"))
    assert cached.distance(SAMPLES) == pytest.approx(far, rel=1e-9)
    judged_pairs = read.judge(held)
    assert judged_pairs.distances.shape == (len(held), 2)
    assert judged_pairs.take(np.arange(3)).distances == pytest.approx(judged_pairs.distances[:3])
    bare = replace(read, feature_space=None)
    assert bare.judge(held).distances.shape == (len(held), 0)
    with pytest.raises(ScoringError, match="fit_feature_space"):
        bare.distance(SAMPLES)
