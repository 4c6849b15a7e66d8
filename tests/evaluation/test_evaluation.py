"""Evaluations: subsets, slices, curves, weights, the pooling gain; on members without a model."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from ensemble_rm import FunctionScorer, Preference, Preferences, RewardEnsemble, evaluate
from ensemble_rm.aggregation import lcb, mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.evaluation.report import evaluation_text
from ensemble_rm.metrics import ece, nll, pair_nll


def number(text: str, place: int) -> float:
    return float(text.split()[place])


def ensemble(members: int = 3) -> RewardEnsemble:
    """Members that read their score from the completion."""
    scorers = [
        FunctionScorer(f"m{i}", lambda s, i=i: number(s.completion, i))  # type: ignore[misc]
        for i in range(members)
    ]
    return RewardEnsemble(tuple(scorers), Normaliser.identity(members), mean())


def pairs(n: int, seed: int, *, named: bool = True, noise: float = 1.5) -> Preferences:
    """Members are the truth plus their own noise; subset `sharp` has T 0.5, `blunt` 3."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        truth = rng.normal(0, 2, 2)
        t, subset = (0.5, "sharp") if i % 2 else (3.0, "blunt")
        first, second = (
            " ".join(f"{truth[side] + rng.normal(0, noise):.4f}" for _ in range(3))
            for side in (0, 1)
        )
        won = rng.random() < expit((truth[0] - truth[1]) / t)
        found.append(
            Preference(
                f"prompt {i // 2}",
                *((first, second) if won else (second, first)),
                weight=1.0 + i % 3,
                subset=subset if named else None,
            )
        )
    return Preferences(tuple(found))


HELD, TEST = pairs(1200, 0), pairs(800, 1)


def test_each_subset_has_a_row_with_its_slices_temperature() -> None:
    plain = ensemble().calibrate(HELD)
    sliced = ensemble().calibrate(HELD, slices=True)
    assert sliced.calibration is not None
    one, two = (evaluate(e, TEST, draws=20) for e in (plain, sliced))
    assert [(row.name, row.pairs) for row in two.subsets] == [("blunt", 400), ("sharp", 400)]
    for row in two.subsets:
        assert row.temperature == sliced.calibration.temperature_of(row.name)
    # Each slice's own temperature is better than one for both.
    own = (e.row("mean()").after["nll"].estimate for e in (one, two))
    assert next(own) > next(own) + 0.01
    assert two.row("minimum()").after == one.row("minimum()").after
    said = json.loads(json.dumps(two.to_json()))
    assert [row["name"] for row in said["subsets"]] == ["blunt", "sharp"]
    text = evaluation_text(two)
    assert "▸ by subset" in text and "  sharp" in text and "pooling gain" in text
    scored = sliced.judge(TEST.shuffled_sides(seed=0))
    np.testing.assert_array_equal(
        two.probability,
        sliced.calibration.probability(scored.margins(mean()), subsets=scored.subsets),
    )
    rows = [i for i, name in enumerate(scored.subsets) if name == "blunt"]
    assert two.subsets[0].metrics["ece"].estimate == pytest.approx(
        ece(two.probability[rows], scored.targets[rows])
    )


def test_pairs_without_subsets_have_no_such_section() -> None:
    evaluation = evaluate(ensemble().calibrate(HELD), pairs(200, 2, named=False), draws=10)
    assert evaluation.subsets == ()
    assert "by subset" not in evaluation_text(evaluation)


def test_accuracy_nll_and_brier_count_weights() -> None:
    """A weight of three is the pair thrice; a common factor is nothing."""
    calibrated = ensemble().calibrate(HELD)
    copied = Preferences(tuple(replace(p, weight=1.0) for p in TEST for _ in range(int(p.weight))))
    scaled = Preferences(tuple(replace(p, weight=7 * p.weight) for p in TEST))
    one, two, three = (evaluate(calibrated, p, draws=10) for p in (TEST, copied, scaled))
    for row in one.rows:
        for name in ("accuracy", "nll", "brier"):
            got = row.after[name].estimate
            assert got == pytest.approx(two.row(row.name).after[name].estimate)
            assert got == pytest.approx(three.row(row.name).after[name].estimate)
    assert one.pooling_gain is not None and two.pooling_gain is not None
    assert one.pooling_gain.estimate == pytest.approx(two.pooling_gain.estimate)


def test_the_pooling_gain_is_what_the_rows_say() -> None:
    apart = evaluate(ensemble().calibrate(HELD), TEST, draws=50)
    members = [row.after["nll"].estimate for row in apart.rows if row.kind == "member"]
    gain = apart.pooling_gain
    assert gain is not None
    assert gain.estimate == pytest.approx(
        np.mean(members) - apart.row("mean()").after["nll"].estimate
    )
    assert 0 < gain.low < gain.estimate < gain.high
    same = evaluate(ensemble().calibrate(pairs(1200, 0, noise=0)), pairs(800, 1, noise=0), draws=20)
    assert same.pooling_gain is not None
    assert same.pooling_gain.estimate == pytest.approx(0, abs=1e-9)
    assert evaluate(ensemble(), TEST, draws=10).pooling_gain is None


@pytest.mark.parametrize("method", ["power", "isotonic", "histogram", "bbq"])
def test_the_own_row_has_the_methods_probabilities_and_the_reward_stays(method: str) -> None:
    plain = ensemble().calibrate(HELD, aggregator=lcb(0.5))
    curved = ensemble().calibrate(
        Preferences(tuple(replace(p, weight=1.0) for p in HELD)),
        aggregator=lcb(0.5),
        method=method,
    )
    assert curved.calibration is not None
    samples = TEST.samples()
    np.testing.assert_array_equal(curved.score(samples).reward, plain.score(samples).reward)
    evaluation = evaluate(curved, TEST, draws=10)
    scored = curved.judge(TEST.shuffled_sides(seed=0))
    p = curved.calibration.probability(scored.margins(lcb(0.5)))
    np.testing.assert_array_equal(evaluation.probability, p)
    own = evaluation.row(str(lcb(0.5)))
    expected = np.average(pair_nll(p, scored.targets), weights=scored.weights)
    assert own.after["nll"].estimate == pytest.approx(expected)
    assert all(row.temperature is None for row in evaluation.subsets)
    again = curved.recalibrate(mean()).calibration
    assert again is not None and again.method == method
    json.dumps(evaluation.to_json())


def test_recalibrate_keeps_slices() -> None:
    sliced = ensemble().calibrate(HELD, slices=True).recalibrate(lcb(0.5))
    assert sliced.calibration is not None
    assert [one.name for one in sliced.calibration.slices] == ["blunt", "sharp"]
    blunt, sharp = sliced.calibration.slices
    assert sharp.temperature < sliced.calibration.temperature < blunt.temperature


def test_compare_takes_each_pairs_slice() -> None:
    sliced = ensemble().calibrate(HELD, slices=True)
    verdict = sliced.compare(
        ["x"] * 4,
        ["1 1 1"] * 4,
        ["0 0 0"] * 4,
        subsets=["sharp", "blunt", None, "unheard of"],
    )
    sharp, blunt, none, unknown = verdict.probability
    assert sharp > none == unknown > blunt


def test_an_impossible_verdict_costs_the_same_from_either_side() -> None:
    assert pair_nll([0.0], [1.0]) == pair_nll([1.0], [0.0]) == pytest.approx(53 * np.log(2))
    assert pair_nll([1e-30], [1.0]) == pair_nll([1 - 1e-30], [0.0])
    assert nll([0.5, 1.0], [1.0, 1.0]) == pytest.approx(np.log(2) / 2)
