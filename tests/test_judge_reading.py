"""Whatever a judge's server answers is read as a verdict, a rating or a reason: nothing raises."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_rm import JudgeComparator, Price
from ensemble_rm.members.judging.reading import Rating, Verdict, read_rating, read_verdict
from ensemble_rm.members.judging.usage import read_usage

WORDS = ("A", "B", "C")
SCALE = (1, 10)

tokens = (
    st.sampled_from(["A", " A", "B", "C", "7", "10", "1", "0", "Verdict:", " ", ""]) | st.text()
)
numbers = st.floats() | st.integers() | st.sampled_from([10**400, -(10**400), 0, -0.1, -9999.0])
leaves = st.none() | st.booleans() | numbers | tokens
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of which each field is right, or anything, or missing."""
    return st.fixed_dictionaries({}, optional={k: v | values for k, v in fields.items()})


options = some({"token": tokens, "logprob": numbers})
entries = some({"token": tokens, "logprob": numbers, "top_logprobs": st.lists(options, max_size=4)})
choices = some(
    {
        "message": some({"content": tokens}),
        "logprobs": some({"content": st.lists(entries, max_size=4)}),
    }
)
behind = st.none() | st.just("Verdict:")


@given(choices, behind)
@settings(max_examples=400)
def test_any_reply_is_a_verdict_or_a_reason(choice: dict[str, Any], after: str | None) -> None:
    found = read_verdict(choice, WORDS, after)
    if isinstance(found, Verdict):
        assert len(found.probabilities) == len(WORDS)
        assert all(0 <= p <= 1 for p in found.probabilities)
        assert math.isclose(sum(found.probabilities), 1)
    else:
        assert isinstance(found, str) and found


@given(choices, behind)
@settings(max_examples=400)
def test_any_reply_is_a_rating_or_a_reason(choice: dict[str, Any], after: str | None) -> None:
    found = read_rating(choice, SCALE, after)
    if isinstance(found, Rating):
        assert SCALE[0] <= found.value <= SCALE[1]
    else:
        assert isinstance(found, str) and found


@given(some({"usage": some({"prompt_tokens": numbers, "completion_tokens": numbers})}))
def test_any_usage_is_counted(answer: dict[str, Any]) -> None:
    found = read_usage(answer, 1.0, Price(1.0, 2.0))
    assert found.prompt_tokens >= 0 and found.cost is not None and math.isfinite(found.cost)


def said(word: str, *entries: Any) -> dict[str, Any]:
    return {"message": {"content": word}, "logprobs": {"content": list(entries)}}


ODD = (
    {"token": "A", "logprob": None, "top_logprobs": []},
    {"token": "A", "logprob": None, "top_logprobs": [{"token": "B", "logprob": -0.1}]},
    {"token": "A"},
    None,
    3,
)


@pytest.mark.parametrize("entry", ODD)
def test_without_the_words_own_probability_the_word_counts(entry: Any) -> None:
    assert read_verdict(said("A", entry), WORDS, None) == Verdict((1.0, 0.0, 0.0), "words")


def test_an_entry_that_is_no_option_is_left_out() -> None:
    top = [None, 3, "B", {"token": "B", "logprob": math.log(0.25)}, {"token": "C"}, {}]
    entry = {"token": "A", "logprob": math.log(0.75), "top_logprobs": top}
    found = read_verdict(said("A", entry), ("A", "B"), None)
    assert isinstance(found, Verdict) and found.source == "logprobs"
    np.testing.assert_allclose(found.probabilities, (0.75, 0.25))


@pytest.mark.parametrize("entry", ODD)
def test_an_odd_reply_takes_no_other_judgment_with_it(entry: Any) -> None:
    fine = {"token": "A", "logprob": -0.1, "top_logprobs": [{"token": "B", "logprob": -2.0}]}

    def handle(request: httpx.Request) -> httpx.Response:
        odd = "odd" in json.loads(request.content)["messages"][-1]["content"]
        choice = said("A", entry if odd else fine)
        return httpx.Response(200, json={"choices": [choice]})

    judge = JudgeComparator("http://j/v1", model="m", transport=httpx.MockTransport(handle))
    found = judge.compare(["q", "q"], ["one", "odd"], ["two", "odd, too"])
    judge.close()
    assert found.failures == (None, None) and found.sources == ("logprobs", "words")


def test_a_rating_over_a_number_of_any_length_is_a_reason() -> None:
    assert isinstance(read_rating(said("8/" + "9" * 5000), SCALE, None), str)


def test_masses_that_are_no_distribution_leave_no_scale() -> None:
    one = {"token": "1", "logprob": 0.0}
    follows = {"token": "0", "logprob": 0.0, "top_logprobs": [{"token": " 0", "logprob": 0.0}]}
    assert read_rating(said("10", one, follows), SCALE, None) == Rating(10, "logprobs")
