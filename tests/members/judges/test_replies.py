"""Whatever a judge's server answers is read as a verdict, a rating or a reason: nothing raises."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ensemble_rm.errors import RemoteAnswerError
from ensemble_rm.members import JudgeComparator, Price
from ensemble_rm.members.judges.replies import Rating, Verdict, read_rating, read_verdict
from ensemble_rm.members.judges.usage import read_usage
from tests.support.judge_doubles import entry

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
        assert isinstance(found, RemoteAnswerError) and str(found)


@given(choices, behind)
@settings(max_examples=400)
def test_any_reply_is_a_rating_or_a_reason(choice: dict[str, Any], after: str | None) -> None:
    found = read_rating(choice, SCALE, after)
    if isinstance(found, Rating):
        assert SCALE[0] <= found.value <= SCALE[1]
    else:
        assert isinstance(found, RemoteAnswerError) and str(found)


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
    assert not found.errors and found.sources == ("logprobs", "words")


def test_a_rating_over_a_number_of_any_length_is_a_reason() -> None:
    assert isinstance(read_rating(said("8/" + "9" * 5000), SCALE, None), RemoteAnswerError)


def test_masses_that_are_no_distribution_leave_no_scale() -> None:
    one = {"token": "1", "logprob": 0.0}
    follows = {"token": "0", "logprob": 0.0, "top_logprobs": [{"token": " 0", "logprob": 0.0}]}
    assert read_rating(said("10", one, follows), SCALE, None) == Rating(10, "logprobs")


# Where a verdict stands, and whether it is one ---------------------------------------------------


def spelt(*tokens: str | dict[str, float]) -> dict[str, Any]:
    """A reply of these tokens; of a mapping the first is the one that was said."""
    named = [{one: 0.99} if isinstance(one, str) else one for one in tokens]
    words = [next(iter(one)) for one in named]
    found = [entry(options, word) for options, word in zip(named, words, strict=True)]
    return said("".join(words), *found)


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize(
    "behind", [("\n", "1", ".", " It is short"), (".", " ", "9", " would need sources"), ()]
)
@pytest.mark.parametrize("rating", ["2", "8", "10"])
def test_a_rating_behind_a_blank_is_the_one_that_was_said(
    blank: str, behind: tuple[str, ...], rating: str
) -> None:
    """Tokens begin with the blank that the marker ends in; no later number takes its place."""
    reply = spelt("Good", ".", "\n", "Score", ":", {f" {rating}": 0.75, " 5": 0.25}, *behind)
    found = read_rating(reply, SCALE, f"Score:{blank}")
    assert found == Rating(pytest.approx(0.75 * int(rating) + 0.25 * 5), "logprobs")


@pytest.mark.parametrize("blank", ["", " "])
def test_a_verdict_behind_a_blank_keeps_its_probability(blank: str) -> None:
    reply = spelt("Verdict", ":", {" A": 0.6, " B": 0.4}, "\n", "A", " is better")
    found = read_verdict(reply, WORDS[:2], f"Verdict:{blank}")
    assert isinstance(found, Verdict) and found.source == "logprobs"
    assert found.probabilities == pytest.approx((0.6, 0.4))


def test_tokens_that_are_not_the_reply_give_no_expectation() -> None:
    """A server may name the tokens of a reasoning that the reply does not hold."""
    reply = spelt("1", ".", " Clear") | {"message": {"content": "8"}}
    assert read_rating(reply, SCALE, None) == Rating(8.0, "words")


@pytest.mark.parametrize(
    "tokens",
    [*(("8", "5"), ("1", "0", "0"), ("8", "/", "100"), ("0",), ("8", "th")), ("1", "1")],
)
def test_a_rating_off_the_scale_is_none_in_tokens_as_in_words(tokens: tuple[str, ...]) -> None:
    assert isinstance(read_rating(said("".join(tokens)), SCALE, None), RemoteAnswerError)
    assert isinstance(read_rating(spelt(*tokens), SCALE, None), RemoteAnswerError)


def test_a_rating_with_a_fraction_is_taken_at_its_word() -> None:
    assert read_rating(spelt("8", ".", "5"), SCALE, None) == Rating(8.5, "words")


@pytest.mark.parametrize(
    "tokens",
    [
        *(("A", "/", "B"), ("A", ",", " B"), ("A", "=", "B"), ("A", "\n\n", "B"), ("A", "|", "B")),
        *(("A", ".", "B"), ("B", "/", "A"), ("A", "/", "C"), ("A", "?", " B", "!")),
    ],
)
def test_a_reply_that_names_two_verdicts_is_none(tokens: tuple[str, ...]) -> None:
    assert isinstance(read_verdict(said("".join(tokens)), WORDS, None), RemoteAnswerError)
    assert isinstance(read_verdict(spelt(*tokens), WORDS, None), RemoteAnswerError)


@pytest.mark.parametrize("text", ["A, because B is vague", "A. A!", "A\n\nThe other, B, is vague."])
def test_a_verdict_with_its_reason_is_one(text: str) -> None:
    assert read_verdict(said(text), WORDS, None) == Verdict((1.0, 0.0, 0.0), "words")
