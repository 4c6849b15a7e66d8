"""Member weights in an ensemble: bound to its members, to its calibration, and saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import FunctionScorer, Preferences, RewardEnsemble, Sample, Versions, recalibrate
from ensemble_rm.aggregation import lcb, make_aggregator, mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.data import Preference
from ensemble_rm.errors import AggregatorMismatchError, OptionError
from ensemble_rm.members import HeadScorer
from ensemble_rm.recalibration import RecalibrationOptions
from ensemble_rm.rl.templates import render
from ensemble_rm.server.wire.native import AggregatorChoice, read_aggregator
from tests.support.recalibration_runs import Loader, judged, stored, write_run

NOW = datetime(2026, 7, 10, tzinfo=UTC)
WEIGHTS = {"rule": 1.0, "judge": 3.0}


def number(sample: Sample, at: int) -> float:
    return float(sample.completion.split()[at])


def of(*names: str, **options: object) -> RewardEnsemble:
    """Return an ensemble whose members read the first or the second number of a completion."""
    scorers = {
        "rule": FunctionScorer("rule", lambda sample: number(sample, 0)),
        "judge": FunctionScorer("judge", lambda sample: number(sample, 1)),
    }
    return RewardEnsemble(
        tuple(scorers[name] for name in names),
        Normaliser.identity(2),
        options.get("aggregator", mean()),  # type: ignore[arg-type]
    )


def pairs(n: int = 400) -> Preferences:
    """Pairs whose judge predicts the verdict and whose rule does so more weakly."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(n, 2, 2))  # (pair, side, member)
    margins = (scores[:, 0] - scores[:, 1]) @ [0.5, 1.5]
    wins = rng.random(n) < 1 / (1 + np.exp(-margins))
    rows = []
    for i, (first, second) in enumerate(scores):
        sides = [f"{side[0]:.6f} {side[1]:.6f}" for side in (first, second)]
        rows.append(Preference(f"prompt {i}", *(sides if wins[i] else sides[::-1])))
    return Preferences(tuple(rows))


def test_columns_are_found_by_name() -> None:
    samples = [Sample("p", "1 5"), Sample("p", "2 2")]
    for names in (("rule", "judge"), ("judge", "rule")):
        ensemble = of(*names, aggregator=mean(weights=WEIGHTS))
        np.testing.assert_array_equal(ensemble.score(samples).reward, [4.0, 2.0])
        other = of(*names).with_aggregator(lcb(1.0, weights=WEIGHTS))
        spread = np.sqrt(0.25 * 3**2 + 0.75 * 1**2)
        np.testing.assert_allclose(other.score(samples).reward, [4.0 - spread, 2.0])


@pytest.mark.parametrize("weights", [{"rule": 1.0}, {"rule": 1.0, "judge": 1.0, "other": 0.0}])
def test_weights_must_name_exactly_the_members(weights: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="weight"):
        of("rule", "judge", aggregator=mean(weights=weights))
    with pytest.raises(OptionError, match="weight"):
        of("rule", "judge").with_aggregator(mean(weights=weights))
    with pytest.raises(OptionError, match="weight"):
        of("rule", "judge").calibrate(pairs(), aggregator=mean(weights=weights))


def test_a_temperature_belongs_to_its_weights() -> None:
    ensemble = of("rule", "judge").calibrate(pairs(), aggregator=mean(weights=WEIGHTS))
    sides = (["p"], ["1 5"], ["2 2"])
    assert ensemble.compare(*sides).probability[0] > 0.5
    for other in (mean(), mean(weights={"rule": 1.0, "judge": 2.0})):
        with pytest.raises(AggregatorMismatchError, match="weights="):
            ensemble.compare(*sides, aggregator=other)
        with pytest.raises(AggregatorMismatchError, match="weights="):
            ensemble.with_aggregator(other).compare(*sides)
        again = ensemble.recalibrate(other)
        assert again.calibration is not None
        assert again.calibration.fit != ensemble.calibration.fit  # type: ignore[union-attr]
        again.compare(*sides)


def test_weights_are_saved_with_the_ensemble_and_its_calibration(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    heads = two_heads()
    weights = dict(zip(heads.names, (1.0, 3.0), strict=True))
    ensemble = RewardEnsemble((heads,), Normaliser.identity(2), lcb(0.5, weights=weights))
    samples = [Sample("a prompt", f"completion {i}") for i in range(6)]
    sides = [(f"yes {i}", f"no {i * i}") for i in range(60)]
    reward = ensemble.score([Sample(f"p {i}", text) for i in range(60) for text in sides[i]]).reward
    rows = []
    for i, (first, second) in enumerate(reward.reshape(60, 2)):
        agrees = i % 3 > 0  # two verdicts of three follow the reward
        chosen, rejected = sides[i] if (first > second) == agrees else sides[i][::-1]
        rows.append(Preference(f"p {i}", chosen, rejected))
    ensemble = ensemble.calibrate(Preferences(tuple(rows)))
    loaded = RewardEnsemble.from_pretrained(ensemble.save_pretrained(tmp_path / "run"))
    assert loaded.aggregator == ensemble.aggregator
    assert loaded.calibration == ensemble.calibration
    np.testing.assert_array_equal(loaded.score(samples).reward, ensemble.score(samples).reward)
    assert loaded.score(samples).reward.tolist() != loaded.score(samples).members.mean(1).tolist()


def test_a_recalibration_keeps_the_weights(tmp_path: Path) -> None:
    """The job reads the aggregator, and the order of its columns, from the folder."""
    weights = {"a": 1.0, "b": 3.0}
    run = write_run(tmp_path / "run", 1.0, aggregator=mean(weights=weights).bind(("a", "b")))
    with stored(tmp_path / "judgments.db", judged(2.0, 3000, seed=1)) as store:
        outcome = recalibrate(
            run,
            store,
            load=Loader(),
            clock=lambda: NOW,
            options=RecalibrationOptions(window=180.0),
        )
    assert outcome.verdict == "published", outcome.reason
    calibration = Versions(run).current().read_calibration()
    assert calibration is not None
    assert calibration.aggregator == mean(weights=weights)
    assert calibration.temperature == pytest.approx(2.0, rel=0.25)


def test_a_request_for_another_rule_keeps_the_weights() -> None:
    own = make_aggregator("mean", nan="omit", weights=WEIGHTS).bind(("rule", "judge"))
    asked = read_aggregator(AggregatorChoice("lcb", {"kappa": 2.0}), own)
    assert asked == make_aggregator("lcb", kappa=2.0, nan="omit", weights=WEIGHTS)
    assert asked is not None and asked([[1.0, 5.0]]).shape == (1,)


def test_a_reward_file_names_the_weights() -> None:
    aggregator = lcb(1.0, weights=WEIGHTS)
    options = {"folder": "runs/hh", "digest": "d", "device": "cpu", "file_name": "reward.py"}
    text = render("trl", aggregator=aggregator, **options)
    (call,) = re.findall(r"aggregator=(make_aggregator\(.*?\)),", text)
    value = eval(call, {"make_aggregator": make_aggregator})
    assert value == aggregator


def test_an_ensemble_without_weights_is_saved_as_before(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1.0)
    saved = json.loads((run / "ensemble.json").read_text())["aggregator"]
    assert saved == {"name": "mean", "parameters": {}, "nan": "raise", "min_members": 1}
