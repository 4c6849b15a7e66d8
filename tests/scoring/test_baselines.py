"""Prompt baselines: references reach the score, a prompt's offset vanishes, a lack is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from ensemble_rm import (
    FunctionScorer,
    Preference,
    Preferences,
    RewardEnsemble,
    Sample,
    load_preferences,
)
from ensemble_rm.aggregation import lcb, mean
from ensemble_rm.calibration import Normaliser, fit_normaliser
from ensemble_rm.data.loading import read_comparisons, read_samples
from ensemble_rm.errors import BadRowsError, BaselineError, OptionError
from ensemble_rm.scoring.baselines import reference_samples

PROMPTS = ("a", "b", "c")
OFFSETS = arrays(np.float64, (2, 3), elements=st.floats(-50, 50))


def ensemble(offsets: np.ndarray, *, baseline: bool = True) -> RewardEnsemble:
    """Two members: one scores length, one counts e; each with an offset a prompt."""

    def member(i: int) -> FunctionScorer:
        def score(s: Sample) -> float:
            own = (len(s.completion), 3 * s.completion.count("e"))[i]
            return own + float(offsets[i, PROMPTS.index(str(s.prompt))])

        return FunctionScorer(f"m{i}", score)

    normaliser = Normaliser((1.0, 2.0), (2.0, 3.0), baseline)
    return RewardEnsemble((member(0), member(1)), normaliser, lcb(0.7))


SAMPLES = [
    Sample(prompt, text, f"reference of {prompt}")
    for prompt in PROMPTS
    for text in ("", "eel", "seventeen", "a long answer")
]


@given(OFFSETS)
def test_an_offset_of_a_prompt_changes_no_reward(offsets: np.ndarray) -> None:
    zero = np.zeros((2, 3))
    np.testing.assert_allclose(
        ensemble(offsets).score(SAMPLES).reward, ensemble(zero).score(SAMPLES).reward, atol=1e-9
    )
    plain = ensemble(offsets, baseline=False).score(SAMPLES).reward
    if np.ptp(offsets) > 1:
        assert np.abs(plain - ensemble(zero, baseline=False).score(SAMPLES).reward).max() > 1e-3


@given(OFFSETS)
def test_a_linear_aggregators_margins_are_those_without_a_baseline(offsets: np.ndarray) -> None:
    one, two = (
        ensemble(offsets, baseline=b).with_aggregator(mean()).score(SAMPLES).reward.reshape(3, 4)
        for b in (True, False)
    )
    np.testing.assert_allclose(np.diff(one, axis=1), np.diff(two, axis=1), atol=1e-9)


def test_each_reference_is_scored_once() -> None:
    asked: list[Sample] = []

    def score(sample: Sample) -> float:
        asked.append(sample)
        return float(len(sample.completion))

    counting = RewardEnsemble(
        (FunctionScorer("m", score),), Normaliser((0.0,), (1.0,), True), mean()
    )
    scores = counting.score(SAMPLES)
    assert len(asked) == len(SAMPLES) + 3
    assert scores.raw.shape == (len(SAMPLES), 1)
    own = [len(s.completion) - len(s.reference or "") for s in SAMPLES]
    np.testing.assert_array_equal(scores.reward, own)
    assert counting.score([]).reward.shape == (0,)
    found, places = reference_samples(SAMPLES)
    assert [found[i].completion for i in places] == [s.reference for s in SAMPLES]


def test_a_missing_reference_is_named_by_its_row() -> None:
    both = ensemble(np.zeros((2, 3)))
    with pytest.raises(BaselineError, match="row 1 has no reference"):
        both.score([SAMPLES[0], Sample("a", "x")])
    with pytest.raises(BaselineError, match="row 0"):
        both.rank(["a"], [["x", "y"]])
    with pytest.raises(OptionError, match="1 references"):
        both.rank(["a", "b"], [["x"], ["y"]], references=["r"])


def test_compare_rank_and_judge_take_references() -> None:
    both = ensemble(np.array([[5.0, -9.0, 30.0], [7.0, 0.0, -4.0]]))
    rng = np.random.default_rng(0)
    pairs = Preferences(
        tuple(
            Preference(
                PROMPTS[i % 3],
                "e" * int(rng.integers(9)),
                "x" * int(rng.integers(9)),
                votes=(2.0, 1.0) if i % 4 else (1.0, 2.0),
                reference="some answer",
            )
            for i in range(120)
        )
    )
    fitted = both.calibrate(pairs)
    prompts = [pair.prompt for pair in pairs]
    first, second = [p.chosen for p in pairs], [p.rejected for p in pairs]
    references = [p.reference for p in pairs]
    verdict = fitted.compare(prompts, first, second, references=references)
    scored = fitted.judge(pairs)
    np.testing.assert_allclose(verdict.margin, scored.margins(fitted.aggregator), atol=1e-12)
    (ranking,) = fitted.rank(["a"], [["e", "eeee", "x"]], references=["some answer"])
    assert list(ranking.order) == [1, 0, 2]
    with pytest.raises(BaselineError, match="row 0"):
        fitted.compare(prompts, first, second)


def test_a_fitted_baseline_leaves_the_scale_and_centres_on_the_references() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 4)
    scores = rng.normal(0, [1.0, 4.0], (200, 2)) + rng.normal(0, 30, (50, 2))[groups]
    below = rng.normal(0, 20, (50, 2))[groups]
    with_it, without = (
        fit_normaliser(scores, groups, baseline=below),
        fit_normaliser(scores, groups),
    )
    assert with_it.baseline and not without.baseline
    np.testing.assert_allclose(with_it.scale, without.scale)
    np.testing.assert_allclose(with_it(scores, below).mean(axis=0), 0, atol=1e-9)
    assert Normaliser.from_json(json.loads(json.dumps(with_it.to_json()))) == with_it
    old = without.to_json()
    del old["baseline"]
    assert Normaliser.from_json(old) == without
    with pytest.raises(BaselineError, match="the scores of the references"):
        with_it(scores)
    with pytest.raises(OptionError, match="no baseline"):
        without(scores, below)
    with pytest.raises(OptionError, match="shape"):
        with_it(scores, below[:1])


def test_references_are_read_and_written(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "reference": "r"}
    (pair,) = load_preferences([row])
    assert pair.reference == "r" and pair.swap().reference == "r"
    assert load_preferences([pair.to_json()])[0] == pair
    assert [s.reference for s in Preferences((pair,)).samples()] == ["r", "r"]
    assert "reference" not in load_preferences([{**row, "reference": None}])[0].to_json()
    (sample,) = read_samples([{"prompt": "Hi", "completion": "a", "reference": "r"}])
    assert sample == Sample("Hi", "a", "r")
    turn = [{"role": "assistant", "content": "r"}]
    (unjudged,) = read_comparisons(
        [{"prompt": "Hi", "first": "a", "second": "b", "reference": turn}]
    )
    assert unjudged.reference == "r"
    with pytest.raises(BadRowsError, match="`reference` must be text"):
        load_preferences([row, {**row, "reference": 3}])
