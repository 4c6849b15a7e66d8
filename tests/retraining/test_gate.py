"""The gate of retrained members, and how judgments are dealt to it."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from ensemble_rm import Preference, Preferences
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.data.weights import effective_sample_size
from ensemble_rm.errors import OptionError, TooFewJudgmentsError
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.metrics import accuracy, nll
from ensemble_rm.retraining.gate import RetrainingGate, gate_members
from ensemble_rm.retraining.splits import RetrainingParts, split_judgments


def scored(margins: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> ScoredPairs:
    first = margins[:, None]
    return ScoredPairs(first, np.zeros_like(first), y, np.ones(len(y)), np.arange(len(y)))


def gate_of(
    n: int, *, seed: int = 0, skill: tuple[float, float] = (0.3, 1.0), **options: Any
) -> RetrainingGate:
    """Two ensembles that see the true margin through more or less noise."""
    rng = np.random.default_rng(seed)
    true = rng.normal(0, 1.5, n)
    y = (rng.random(n) < expit(true)).astype(float)
    seen = [s * true + rng.normal(0, 1 - s, n) * 1.5 for s in skill]
    chosen = {"delta": 0.02, "delta_accuracy": 0.05, "temperatures": (1.0, 1.0)} | options
    return gate_members(scored(seen[0], y), scored(seen[1], y), mean(), **chosen)


def test_better_members_pass_and_worse_ones_do_not() -> None:
    assert gate_of(600).answer == "publish"
    turned = gate_of(600, skill=(1.0, 0.3))
    assert turned.answer == "keep" and "not better" in turned.reason
    same = gate_of(600, skill=(1.0, 1.0))
    assert same.answer == "keep" and same.nll.difference == 0


def test_its_figures_are_those_of_the_metrics() -> None:
    rng = np.random.default_rng(3)
    y = rng.integers(0, 4, 90) / 3
    one, two = rng.normal(size=(2, 90))
    found = gate_members(
        scored(one, y), scored(two, y), mean(), temperatures=(2.0, 0.5), delta=1, delta_accuracy=0.1
    )
    assert found.nll.nll_before == pytest.approx(nll(expit(one / 2), y))
    assert found.nll.nll_after == pytest.approx(nll(expit(two / 0.5), y))
    assert found.accuracy.before == pytest.approx(accuracy(expit(one), y))
    assert found.accuracy.after == pytest.approx(accuracy(expit(two), y))


def test_doubt_asks_for_about_as_many_judgments_as_settle_it() -> None:
    few = [gate_of(40, seed=seed, skill=(0.5, 1.0)) for seed in range(60)]
    doubtful = [g for g in few if g.answer == "too few"]
    assert len(doubtful) >= 10
    for gate in doubtful:
        assert gate.needed is not None and gate.needed > 40 and str(gate.needed) in gate.reason
    many = int(np.median([g.needed for g in doubtful if g.needed is not None]))
    settled = [gate_of(many, seed=100 + s, skill=(0.5, 1.0)).answer for s in range(20)]
    assert settled.count("too few") < 10


def test_a_fall_of_accuracy_keeps_the_incumbent() -> None:
    """Probabilities near ½ are safe for the NLL, and wrong as often as not."""
    rng = np.random.default_rng(0)
    n = 500
    true = rng.choice([-0.2, 0.2], n)
    y = (rng.random(n) < expit(6 * true)).astype(float)
    loud = np.where(rng.random(n) < 0.93, 40 * true, -40 * true)
    quiet = np.where(rng.random(n) < 0.5, true, -true) * 0.01
    found = gate_members(
        scored(loud, y),
        scored(quiet, y),
        mean(),
        temperatures=(1.0, 1.0),
        delta=0.02,
        delta_accuracy=0.05,
    )
    assert found.nll.passed and not found.accuracy.passed
    assert found.answer == "keep" and "accuracy falls" in found.reason


def test_a_coin_has_an_infinite_temperature() -> None:
    found = gate_of(400, temperatures=(math.inf, 1.0))
    assert found.nll.nll_before == pytest.approx(math.log(2))


# Parts ----------------------------------------------------------------------------------------

START = datetime(2026, 1, 1, tzinfo=UTC)


def judged(n: int, *, prompts: int, pi: bool = True, seed: int = 0) -> list[Judgment]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        g = i * prompts // n  # prompts come one after another
        chosen = {"strategy": "bald", "inclusion": float(rng.uniform(0.05, 1))} if pi else {}
        found.append(
            Judgment(
                f"prompt {g}",
                f"first {i % 7}",
                f"second {i % 7}",
                outcome=rng.choice(["first", "second", "tie"]),
                annotator=f"a{i % 3}",
                judged_at=START + timedelta(hours=i),
                source="test",
                batch=f"b{i % 2}",
                **chosen,
            )
        )
    return found


OLD = Preferences((Preference("prompt 3", "a", "b"), Preference("elsewhere", "a", "b")))
SHARES: dict[str, Any] = {"gate_share": 0.25, "calibration_share": 0.25, "weighted": True}


def parts_of(judgments: list[Judgment], **options: Any) -> RetrainingParts:
    return split_judgments(judgments, OLD, **(SHARES | options))


def test_no_prompt_is_in_two_parts_and_known_ones_are_trained_on() -> None:
    judgments = judged(400, prompts=90)
    parts = parts_of(judgments)
    keys = [part.prompt_keys for part in (parts.train, parts.calibration, parts.gate)]
    assert not (keys[0] & keys[1] or keys[0] & keys[2] or keys[1] & keys[2])
    known = [one for one in judgments if one.prompt == "prompt 3"]
    assert parts.judgments["known"] == len(known) > 0
    assert "prompt 3" in {pair.prompt for pair in parts.train}
    assert (
        sum(parts.judgments[name] for name in ("train", "calibration", "gate", "left_out")) == 400
    )
    for name in ("calibration", "gate"):
        assert 70 <= parts.judgments[name] <= 130
    newest = {one.prompt for one in judgments[-80:]}
    assert newest <= {pair.prompt for pair in parts.gate}


def test_what_calibrates_is_never_trained_on_later() -> None:
    """Month by month with all judgments so far: an incumbent knows no calibration prompt."""
    judgments = judged(600, prompts=300)
    trained: set[str] = set()
    calibrating: set[str] = set()
    for end in (200, 350, 600):
        parts = parts_of(judgments[:end])
        assert not parts.calibration.prompt_keys & trained
        assert not parts.train.prompt_keys & calibrating
        trained |= parts.train.prompt_keys
        calibrating |= parts.calibration.prompt_keys
    other = parts_of(judgments, seed=1)
    assert other.calibration.prompt_keys != parts_of(judgments).calibration.prompt_keys


def test_each_design_counts_as_many_as_its_judgments() -> None:
    judgments = judged(300, prompts=100)
    parts = parts_of(judgments)
    total = sum(part.weights.sum() for part in (parts.train, parts.calibration, parts.gate))
    assert total == pytest.approx(300, rel=0.1)  # all but those left out; 1 each on average
    gate = [one for one in judgments if one.prompt in {p.prompt for p in parts.gate}]
    one, two = (
        next(p.weight for p in parts.gate if (p.prompt, p.chosen) == (j.prompt, j.first))
        for j in gate[:3:2]  # of one batch
    )
    assert one / two == pytest.approx((gate[2].inclusion or 0) / (gate[0].inclusion or 0))
    assert parts.effective["gate"] == pytest.approx(
        effective_sample_size(parts.gate.weights), rel=0.2
    )


def test_without_weights_each_judgment_trains_as_one() -> None:
    parts = parts_of(judged(300, prompts=100), weighted=False)
    assert (parts.train.weights == 1).all()
    assert np.ptp(parts.gate.weights) > 0.5
    votes = parts_of([replace(j, first="x", second="y") for j in judged(300, prompts=50, pi=False)])
    assert votes.train.weights.max() > 1  # several judgments of one pair are votes
    assert {p.target for p in votes.train} - {0.0, 0.5, 1.0}


def test_too_little_is_said_by_name() -> None:
    with pytest.raises(TooFewJudgmentsError, match="were not"):
        parts_of([replace(j, prompt="prompt 3") for j in judged(30, prompts=9)])
    with pytest.raises(TooFewJudgmentsError, match="time"):
        parts_of([replace(j, judged_at=START) for j in judged(30, prompts=9)])
    with pytest.raises(OptionError, match="gate_share"):
        parts_of(judged(30, prompts=9), gate_share=0.8)
