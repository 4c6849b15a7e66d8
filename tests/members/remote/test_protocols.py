"""Protocols: our requests against servers that answer as the released ones do, traps included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, strategies as st
from starlette.applications import Starlette

from ensemble_rm import Message, Sample
from ensemble_rm.errors import (
    OptionError,
    RemoteAnswerError,
    RemoteFailureWarning,
    RemoteRefusalError,
)
from ensemble_rm.members import RemoteScorer
from ensemble_rm.members.remote.protocols import WIRES, RequestOptions, read_number
from ensemble_rm.members.remote.request_text import Rendered
from tests.support import wire_doubles as doubles

TEXTS = ["a", "b", "hello there", "ünïcode ☃", "", " "]
SAMPLES = [Sample("ask: ", text) for text in TEXTS]
PLAIN = [f"ask: {text}" for text in TEXTS]


def scorer(url: str, protocol: str, **options: Any) -> RemoteScorer:
    options = {"template": "plain", "raw_logit_check": "off", "name": "far"} | options
    return RemoteScorer(url, protocol=protocol, **options)


CASES: list[tuple[str, Callable[[], Starlette]]] = [
    ("vllm-classify", doubles.vllm),
    ("vllm-pooling", doubles.vllm),
    ("vllm-pooling", lambda: doubles.vllm(tokens=True)),
    ("sglang", doubles.sglang),
    ("tei", doubles.tei),
    ("openrlhf", doubles.openrlhf),
]


@pytest.mark.parametrize(("protocol", "app"), CASES)
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_raw_logits_arrive_in_order(protocol: str, app: Callable[[], Starlette], n: int) -> None:
    """One text, and two, which TEI takes for a pair where they stand in a flat list."""
    with doubles.serving(app()) as url:
        found = scorer(url, protocol).score(SAMPLES[:n])
    expected = [doubles.logit_of(text) for text in PLAIN[:n]]
    assert found.shape == (n, 1)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    assert found.max() > 1 or found.min() < 0


def test_the_traps_are_there() -> None:
    """What a naive client would send: the doubles would catch it."""
    with doubles.serving(doubles.vllm()) as url:
        naive = httpx.post(f"{url}/classify", json={"input": ["ask: a"]}).json()
    assert naive["data"][0]["probs"][0] == doubles.sigmoid(doubles.logit_of("ask: a"))
    with doubles.serving(doubles.tei()) as url:
        pair = httpx.post(f"{url}/predict", json={"inputs": ["a", "b"], "raw_scores": True}).json()
        raw = httpx.post(f"{url}/predict", json={"inputs": [["a"], ["b"]]}).json()
    assert len(pair) == 1 and "score" in pair[0]
    assert all(0 < row[0]["score"] < 1 for row in raw)
    with doubles.serving(doubles.sglang()) as url:
        soft = httpx.post(f"{url}/v1/classify", json={"input": ["a", "b"]}).json()
    assert [row["probs"] for row in soft["data"]] == [[1.0], [1.0]]


def test_messages_are_rendered_by_the_server() -> None:
    turns = (Message("system", "Be brief."), Message("user", "Hi"))
    samples = [Sample(turns, "Hello."), Sample("Hi", "Hello."), Sample("Hi", "No.")]
    with doubles.serving(doubles.vllm()) as url:
        found = scorer(url, "vllm-classify", template="messages").score(samples)
    texts = ["<|system|>Be brief.<|user|>Hi<|assistant|>Hello."]
    texts += ["<|user|>Hi<|assistant|>Hello.", "<|user|>Hi<|assistant|>No."]
    assert found[:, 0].tolist() == [doubles.logit_of(text) for text in texts]


def test_a_pair_is_one_where_it_is_meant() -> None:
    with doubles.serving(doubles.tei()) as url:
        found = scorer(url, "tei", template="pair").score([Sample("p", "a"), Sample("p", "b")])
    expected = [doubles.logit_of("p[SEP]a"), doubles.logit_of("p[SEP]b")]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("protocol", "app"), CASES)
def test_a_nan_of_the_model_is_no_score(protocol: str, app: Callable[[], Starlette]) -> None:
    """400 and null in vLLM, 500 in SGLang and OpenRLHF, 424 in TEI: NaN for that sample alone."""

    def broken(text: str) -> float:
        return math.nan if text.endswith("bad") else doubles.logit_of(text)

    name = {"vllm-classify": "vllm", "vllm-pooling": "vllm"}.get(protocol, protocol)
    samples = [Sample("p ", text) for text in ["a", "b", "bad", "c", "d"]]
    with (
        doubles.serving(doubles.APPS[name](broken)) as url,
        pytest.warns(RemoteFailureWarning, match="1 of 5"),
    ):
        found = _impatient(url, protocol).score(samples)
    assert np.isnan(found[:, 0]).tolist() == [False, False, True, False, False]


def _impatient(url: str, protocol: str) -> RemoteScorer:
    from ensemble_rm.members import ClientOptions

    return scorer(url, protocol, client=ClientOptions(backoff=1e-3, attempts=2))


def test_a_server_without_the_protocol_is_refused_at_once() -> None:
    """A model that scores every token has no /classify: 501, whatever is asked."""
    with doubles.serving(doubles.vllm(tokens=True)) as url:
        with pytest.raises(RemoteRefusalError, match="501"):
            scorer(url, "vllm-classify").score(SAMPLES)
        assert np.isfinite(scorer(url, "vllm-pooling").score(SAMPLES)).all()


@pytest.mark.parametrize("protocol", ["vllm-classify", "tei"])
def test_a_sample_that_is_too_long(protocol: str) -> None:
    """Rejected for itself alone; cut by the server only where that is asked for."""
    samples = [Sample("", "a"), Sample("", "x" * (doubles.LONGEST + 1)), Sample("", "b")]
    app = doubles.vllm() if protocol == "vllm-classify" else doubles.tei()
    with doubles.serving(app) as url:
        with pytest.warns(RemoteFailureWarning, match="1 of 3"):
            found = scorer(url, protocol).score(samples)
        assert np.isnan(found[:, 0]).tolist() == [False, True, False]
        assert np.isfinite(scorer(url, protocol, truncate=True).score(samples)).all()


def test_a_batch_limit_of_the_server_costs_nothing() -> None:
    samples = [Sample("", str(i)) for i in range(40)]
    with doubles.serving(doubles.tei(largest=10)) as url:
        found = scorer(url, "tei", batch_size=40).score(samples)
    np.testing.assert_allclose(
        found[:, 0], [doubles.logit_of(str(i)) for i in range(40)], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("protocol", "template"),
    [("sglang", "messages"), ("vllm-classify", "pair"), ("ensemble-rm", "plain"), ("tei", "huh")],
)
def test_forms_that_a_protocol_does_not_take(protocol: str, template: str) -> None:
    with pytest.raises(OptionError):
        scorer("http://localhost:1", protocol, template=template)


# Answers -----------------------------------------------------------------------------------------


def numbers(values: list[Any]) -> dict[str, Any]:
    """The answer of each protocol that holds these values."""
    data = [{"index": i, "probs": [v], "data": [v]} for i, v in enumerate(values)]
    return {
        "vllm-classify": {"data": data},
        "vllm-pooling": {"data": data},
        "sglang": [{"embedding": [v]} for v in values],
        "tei": [[{"score": v, "label": "LABEL_0"}] for v in values],
        "openrlhf": {"rewards": values},
        "ensemble-rm": {"rewards": values},
    }


@pytest.mark.parametrize("protocol", WIRES)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_finite_numbers_are_read_as_they_are(protocol: str, values: list[float]) -> None:
    assert WIRES[protocol].answer(numbers(values)[protocol], len(values)) == values


@pytest.mark.parametrize("protocol", WIRES)
@pytest.mark.parametrize("bad", [None, "1.0", True, math.nan, math.inf, 10**400, [], {}])
def test_what_is_no_number_is_never_a_score(protocol: str, bad: Any) -> None:
    first, second, third = WIRES[protocol].answer(numbers([1.5, bad, -2.0])[protocol], 3)
    assert (first, third) == (1.5, -2.0)
    assert isinstance(second, RemoteAnswerError) and str(second)


@pytest.mark.parametrize("protocol", WIRES)
@pytest.mark.parametrize("bad", [None, [], {}, 3.0, "x", {"data": None}, {"rewards": 1}, [1, 2, 3]])
def test_answers_of_another_shape_are_named_errors_or_no_scores(protocol: str, bad: Any) -> None:
    try:
        found = WIRES[protocol].answer(bad, 3)
    except RemoteAnswerError:
        return
    assert all(isinstance(one, RemoteAnswerError) for one in found)


@pytest.mark.parametrize("protocol", WIRES)
@pytest.mark.parametrize("n", [2, 4])
def test_another_number_of_scores_is_an_error(protocol: str, n: int) -> None:
    with pytest.raises(RemoteAnswerError):
        WIRES[protocol].answer(numbers([1.0, 2.0, 3.0])[protocol], n)


@given(order=st.permutations(range(6)))
def test_entries_go_where_their_index_says(order: list[int]) -> None:
    data = [{"index": i, "probs": [float(i)]} for i in order]
    assert WIRES["vllm-classify"].answer({"data": data}, 6) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("index", [0, 7, -1, "1", None])
def test_an_index_that_is_taken_or_none(index: Any) -> None:
    data = [{"index": 0, "probs": [1.0]}, {"index": index, "probs": [1.0]}]
    with pytest.raises(RemoteAnswerError, match="index"):
        WIRES["vllm-classify"].answer({"data": data}, 2)


def test_two_outputs_are_no_reward_model() -> None:
    (found,) = WIRES["sglang"].answer([{"embedding": [0.1, 0.2]}], 1)
    assert isinstance(found, RemoteAnswerError) and "2 numbers" in str(found)


def test_every_text_request_asks_for_raw_logits() -> None:
    items = [Rendered(text="a"), Rendered(text="b")]
    asked = RequestOptions(model="m", special_tokens=False)
    assert WIRES["vllm-classify"].request(items, asked) == {
        "model": "m",
        "input": ["a", "b"],
        "use_activation": False,
        "add_special_tokens": False,
    }
    assert WIRES["vllm-pooling"].request(items, asked)["encoding_format"] == "float"
    assert WIRES["sglang"].request(items, asked) == {"text": ["a", "b"]}
    assert WIRES["tei"].request(items, asked) == {
        "inputs": [["a"], ["b"]],
        "raw_scores": True,
        "truncate": False,
    }


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_read_number_keeps_numbers(value: float) -> None:
    found = read_number(value)
    assert found == float(value) if abs(value) < 1e300 else True
