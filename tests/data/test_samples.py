"""Samples and preferences: identity of prompts, sides, splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ensemble_rm import Message, Preference, Preferences, Sample, load_preferences
from ensemble_rm.data.samples import as_prompt, prompt_key
from ensemble_rm.errors import DataError, OptionError

TEXT = st.text("ab ", min_size=1, max_size=3)
PREFERENCE = st.builds(
    Preference,
    TEXT,
    TEXT,
    TEXT,
    margin=st.floats(-2, 2),
    weight=st.floats(0.1, 5),
    votes=st.none() | st.tuples(st.integers(0, 5).map(float), st.integers(1, 5).map(float)),
    subset=st.none() | TEXT,
)
MANY = st.lists(PREFERENCE, min_size=1, max_size=30).map(lambda p: Preferences(tuple(p)))


@given(PREFERENCE)
def test_swapping_twice_changes_nothing_that_is_learned(pair: Preference) -> None:
    once, twice = pair.swap(), pair.swap().swap()
    assert once.target == pytest.approx(1 - pair.target)
    assert (twice.chosen, twice.rejected, twice.margin) == (pair.chosen, pair.rejected, pair.margin)
    assert twice.target == pytest.approx(pair.target)


@given(MANY)
def test_json_round_trip(pairs: Preferences) -> None:
    again = load_preferences([pair.to_json() for pair in pairs])
    assert again.pairs == pairs.pairs
    assert again.digest == pairs.digest


@given(MANY, st.integers(0, 99))
def test_a_split_never_parts_a_prompt_and_loses_nothing(pairs: Preferences, seed: int) -> None:
    try:
        parts = pairs.split(0.5, 0.5, seed=seed)
    except DataError:
        assert len(pairs.prompt_keys) < 2 or len(pairs) < 4
        return
    keys = [part.prompt_keys for part in parts]
    assert keys[0].isdisjoint(keys[1])
    assert sorted(map(repr, [*parts[0], *parts[1]])) == sorted(map(repr, pairs))
    assert parts[0].pairs == pairs.split(0.5, 0.5, seed=seed)[0].pairs


def test_a_split_comes_near_its_fractions() -> None:
    pairs = Preferences(tuple(Preference(f"p{i // 3}", "a", "b") for i in range(3000)))
    sizes = [len(part) for part in pairs.split(0.7, 0.1, 0.1, 0.1, seed=0)]
    assert sizes == pytest.approx([2100, 300, 300, 300], abs=6)
    with pytest.raises(DataError, match="empty"):
        pairs[:3].split(0.5, 0.5, seed=0)
    with pytest.raises(OptionError):
        pairs.split(0.9, 0.2, seed=0)


@given(MANY.filter(lambda p: len(p) > 1), st.integers(0, 9))
def test_folds_hold_every_pair_once_and_prompts_together(pairs: Preferences, seed: int) -> None:
    folds = pairs.folds(2, seed=seed)
    assert sorted(np.concatenate(folds)) == list(range(len(pairs)))
    assert pairs.take(folds[0]).prompt_keys.isdisjoint(pairs.take(folds[1]).prompt_keys)


def test_a_single_user_turn_is_the_same_prompt_as_its_text() -> None:
    turn = {"role": "user", "content": "Hi"}
    assert prompt_key(as_prompt("Hi")) == prompt_key(as_prompt([turn]))
    assert prompt_key(as_prompt([turn, turn])) != prompt_key(as_prompt("Hi"))
    assert as_prompt([turn]) == (Message("user", "Hi"),)


@pytest.mark.parametrize("prompt", [3, None, [{"role": "user"}], ["Hi"], [{"content": "x"}]])
def test_bad_prompts(prompt: object) -> None:
    with pytest.raises(DataError):
        as_prompt(prompt)


def test_shuffled_sides_keep_the_verdicts() -> None:
    pairs = Preferences(tuple(Preference(f"p{i}", f"good{i}", f"bad{i}") for i in range(400)))
    mixed = pairs.shuffled_sides(seed=1)
    assert 150 < sum(pair.target for pair in mixed) < 250
    for pair in mixed:
        assert (pair.chosen if pair.target == 1 else pair.rejected).startswith("good")
    assert mixed.pairs == pairs.shuffled_sides(seed=1).pairs


@pytest.mark.parametrize("wrap", [list, tuple])
def test_a_sample_takes_messages_as_files_hold_them(wrap: Any) -> None:
    turns = wrap([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    messages = (Message("user", "Hi"), Message("assistant", "Hello."))
    sample = Sample(turns, "x")
    assert sample == Sample(messages, "x") == Sample(wrap(messages), "x")
    assert hash(sample) == hash(Sample(messages, "x")) and sample.prompt == messages


def test_a_prompt_that_is_no_conversation_is_named() -> None:
    prompts: list[Any] = [None, 3, [{"role": "user"}], ["Hi"]]
    for prompt in prompts:
        with pytest.raises(DataError, match=r"prompt|message 0"):
            Sample(prompt, "x")
