"""What a client's own mistake costs: a 4xx, and neither an alarm nor others' time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel
from starlette.testclient import TestClient

from ensemble_rm import FunctionScorer, Preference, Preferences, RewardEnsemble, Sample
from ensemble_rm.aggregation import make_aggregator, mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import DataError, TooLargeError, UnprocessableError
from ensemble_rm.rl.chat import read_label, without_stops
from ensemble_rm.server.http.app import check_entries, check_lists, read_model
from ensemble_rm.server.options import Limits, ServerOptions
from ensemble_rm.server.wire import llamafactory, native, openrlhf, raw_text, sglang, vllm
from ensemble_rm.server.wire.raw_text import RawText
from tests.support.server_process import length, lengths
from tests.support.server_runs import client, one


def alone() -> RewardEnsemble:
    return RewardEnsemble((FunctionScorer("length", length),), Normaliser.identity(1), mean())


def giving(*scores: float) -> RewardEnsemble:
    members = tuple(FunctionScorer(f"m{i}", lambda _, s=s: s) for i, s in enumerate(scores))  # type: ignore[misc]
    return RewardEnsemble(members, Normaliser.identity(len(scores)), mean())


# An aggregator that the ensemble cannot be asked for ---------------------------------------------

IMPOSSIBLE = [
    ({"name": "lcb", "kappa": 1}, alone(), "OneMemberError"),
    ({"name": "uwo", "lam": 0.5}, alone(), "OneMemberError"),
    ({"name": "uwo", "lam": 1}, giving(1e160, -1e160), "NonFiniteScoreError"),  # it overflows
]


@pytest.mark.parametrize(("aggregator", "ensemble", "name"), IMPOSSIBLE)
def test_an_aggregator_that_cannot_be_asked_for_is_the_requests_fault(
    aggregator: dict[str, Any],
    ensemble: RewardEnsemble,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = one("Hello") | {"aggregator": aggregator}
    with (
        client(ensemble) as asking,
        caplog.at_level(logging.INFO, "ensemble_rm.server.http.app"),
    ):
        answer = asking.post("/v1/score", json=body)
        assert answer.status_code == 422 and name in answer.json()["error"]["message"]
        partial = asking.post("/v1/score", json=body | {"partial": True}).json()
        assert (partial["rewards"], partial["errors"]) == ([None], [name])
    assert not [r for r in caplog.records if r.name == "ensemble_rm.server.http.app"]


@pytest.fixture(scope="module")
def written() -> Iterator[dict[int, TestClient]]:
    """Servers of 2 to 5 members, whose scores are what a completion lists."""
    with ExitStack() as stack:
        yield {k: stack.enter_context(client(reading(k))) for k in range(2, 6)}


def reading(k: int) -> RewardEnsemble:
    def score(sample: Sample, i: int) -> float:
        # The server warms up with a completion of its own.
        return float(json.loads(sample.completion)[i]) if sample.completion[0] == "[" else 0.0

    members = tuple(FunctionScorer(f"m{i}", partial(score, i=i)) for i in range(k))
    return RewardEnsemble(members, Normaliser.identity(k), mean())


@given(
    st.sampled_from([("uwo", "lam"), ("lcb", "kappa")]),
    st.floats(0, 1e6),
    st.lists(st.floats(-1e100, 1e100), min_size=2, max_size=5),
)
def test_what_may_be_asked_for_has_a_reward(
    written: dict[int, TestClient], named: tuple[str, str], coefficient: float, scores: list[float]
) -> None:
    name, option = named
    body = one(json.dumps(scores)) | {"aggregator": {"name": name, option: coefficient}}
    answer = written[len(scores)].post("/v1/score", json=body)
    assert answer.status_code == 200
    expected = make_aggregator(name, **{option: coefficient})(np.array([scores]))  # type: ignore[arg-type]
    assert answer.json()["rewards"] == expected.tolist()


def test_an_aggregator_of_the_ensembles_own_is_not() -> None:
    """A sample without a score fails by its own error, whatever aggregator was asked for."""
    body = one("bad") | {"aggregator": {"name": "minimum"}}
    with client(alone()) as asking:
        answer = asking.post("/v1/score", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "NonFiniteScoreError")


# Bodies of many faults ---------------------------------------------------------------------------

MANY = 1000
FAULTY: list[tuple[type[BaseModel], Any]] = [
    (native.ScoreRequest, {"samples": [1] * MANY}),
    (native.ScoreRequest, {"samples": [{}] * MANY}),
    (native.ScoreRequest, {"samples": [{"prompt": [1] * MANY, "completion": ""}] * MANY}),
    (native.ScoreRequest, {"samples": [dict.fromkeys(map(str, range(MANY)))]}),
    (native.ScoreRequest, dict.fromkeys(map(str, range(MANY)))),
    (native.ScoreRequest, one("a") | {"aggregator": dict.fromkeys(map(str, range(MANY)))}),
    (
        native.ScoreRequest,
        one("a") | {"aggregator": {"name": "mean"} | dict.fromkeys(map(str, range(MANY)))},
    ),
    (native.CompareRequest, {"pairs": [1] * MANY}),
    (openrlhf.OpenRLHFRequest, {"query": [1] * MANY}),
    (openrlhf.OpenRLHFRequest, {"query": ["a"], "prompts": [1] * MANY}),
    (vllm.ClassifyText, {"input": [1] * MANY}),
    (vllm.ClassifyChat, {"messages": [1] * MANY}),
    (vllm.ClassifyChat, {"messages": [{"role": "?", "content": 1}] * MANY}),
    (sglang.SGLangText, {"text": [1] * MANY}),
    (sglang.EmbeddingsRequest, {"input": [""] * MANY}),
    (llamafactory.ScoreEvaluationRequest, {"model": "m", "messages": [1] * MANY}),
]


@pytest.mark.parametrize(("kind", "body"), FAULTY)
def test_a_body_of_many_faults_is_refused_for_the_first(kind: type[BaseModel], body: Any) -> None:
    """Each fault that is built costs time on the event loop and memory."""
    with pytest.raises(UnprocessableError) as refused:
        read_model(kind, body)
    assert " more" not in str(refused.value).replace("more fields than", "")


# Sizes before anything else ----------------------------------------------------------------------

CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
LABEL = json.dumps([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/get_reward", lambda q: {"query": [q], "prompts": [CHATML], "labels": [LABEL]}),
        ("/get_reward", lambda q: {"query": [q]}),
        ("/classify", lambda q: {"input": [q]}),
        ("/classify", lambda q: {"text": q}),
        ("/v1/embeddings", lambda q: {"input": q}),
        ("/v1/score/evaluation", lambda q: {"model": "m", "messages": [q]}),
    ],
)
def test_a_text_that_is_too_long_is_not_taken_apart(
    path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ServerOptions(
        limits=Limits(max_characters=1000), raw_text=RawText(policy_template="chatml")
    )
    with client(lengths(), options) as asking:
        assert asking.post(path, json=body(f"{CHATML}Hello<|im_end|>")).status_code == 200
        monkeypatch.setattr(raw_text, "read_query", None)
        monkeypatch.setattr(raw_text.TurnTemplate, "read", None)
        answer = asking.post(path, json=body(CHATML + "<|im_end|>" * 100))
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "TooLargeError")


@given(st.integers(0, 8), st.integers(1, 4), st.sampled_from(["samples", "pairs", "query"]))
def test_a_list_is_as_long_as_a_request_may_be(n: int, most: int, name: str) -> None:
    body = {"model": "m", name: [None] * n, "partial": True}
    if n > most:
        with pytest.raises(TooLargeError, match=f"list of {n}"):
            check_lists(body, Limits(max_samples=most))
    else:
        check_lists(body, Limits(max_samples=most))


@given(
    st.recursive(
        st.none() | st.text(max_size=2),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=20,
    )
)
def test_a_body_has_as_many_entries_as_its_tokens_allow(body: Any) -> None:
    def entries(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value
        own = len(value) if isinstance(value, list) else 0
        return own + sum(entries(v) for v in inner if isinstance(v, dict | list)) if inner else own

    n = entries(body) if isinstance(body, dict | list) else 0
    check_entries(body, Limits(max_tokens=4 * n + 1, max_samples=1))
    if n > 4:
        check_entries(body, Limits(max_tokens=4 * (n - 4), max_samples=1))
    if n > 5:
        with pytest.raises(TooLargeError, match=f"more than {n - 1} messages"):
            check_entries(body, Limits(max_tokens=4 * (n - 5), max_samples=1))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", lambda turns: {"samples": [{"prompt": turns, "completion": ""}]}),
        ("/v1/compare", lambda turns: {"pairs": [{"prompt": turns, "first": "", "second": ""}]}),
        ("/classify", lambda turns: {"messages": turns}),
    ],
)
def test_many_tiny_messages_are_refused_before_their_shape_is_read(
    path: str, body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": ""}] * 100_000
    monkeypatch.setattr(BaseModel, "model_validate", None)
    with client(lengths()) as asking:
        answer = asking.post(path, json=body(turns))
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "TooLargeError")


STOPS = ["<e>", "<e><e>", "e>", "", " ", "x\n"]
pieces = st.lists(
    st.sampled_from(["<e>", "e>", ">", "x", " ", "\n", "\u2003", "Hello"]), max_size=12
)


@given(pieces, st.lists(st.sampled_from(STOPS), max_size=4))
def test_what_ends_a_turn_is_cut_as_often_as_it_stands(parts: list[str], stop: list[str]) -> None:
    """The longest first, again and again, with the white space between: the plain loop's result."""
    text = expected = "".join(parts)
    while ends := [word for word in stop if word and expected.rstrip().endswith(word)]:
        expected = expected.rstrip().removesuffix(max(ends, key=len))
    assert without_stops(text, stop) == expected.rstrip()


def test_a_label_of_text_in_text_holds_no_messages() -> None:
    deep = json.dumps("[" * 100_000)
    body = {"query": [f"{CHATML}Hello"], "prompts": [CHATML], "labels": [deep]}
    with client(lengths(), ServerOptions(raw_text=RawText(policy_template="chatml"))) as asking:
        assert asking.post("/get_reward", json=body).json()["rewards"] == [7.5]


ANSWERS = ["42", "x = 3", "[0, 1]", "[]", "[[1, 2], [3]]", '["a", "b"]', '[{"x": 1}]', "null"]
ANSWERS += ["3.5", '{"answer": 3}', '"B"']


@pytest.mark.parametrize("label", [*ANSWERS, *map(json.loads, ANSWERS[2:]), None])
def test_a_label_that_is_a_right_answer_holds_no_messages(label: object) -> None:
    """Whatever JSON it happens to be: the query's template says what was asked."""
    assert read_label(label) == (None, None)
    body = {"query": [f"{CHATML}Hello"], "prompts": [CHATML], "labels": [label]}
    with client(lengths(), ServerOptions(raw_text=RawText(policy_template="chatml"))) as asking:
        assert asking.post("/get_reward", json=body).json()["rewards"] == [7.5]


@pytest.mark.parametrize("turns", [[{"role": "user"}], [*json.loads(LABEL), 3]])
def test_messages_that_cannot_be_read_are_no_right_answer(turns: list[Any]) -> None:
    """Passed over, they would leave a member that reads raw text with another prompt."""
    for label in (turns, json.dumps(turns)):
        with pytest.raises(DataError):
            read_label(label)


# Numbers that JSON, or a format, does not have ----------------------------------------------------


RAW = ServerOptions(raw_text=RawText(raw_text_members=("m0", "m1")))


@pytest.mark.parametrize("most", [1e200, 1.5e308])
@pytest.mark.parametrize("aggregator", ["median", "minimum"])
def test_a_spread_that_is_beyond_a_float_is_null(most: float, aggregator: str) -> None:
    ensemble = giving(most, -most).with_aggregator(make_aggregator(aggregator))  # type: ignore[arg-type]
    with client(ensemble, RAW) as asking:
        for partial in (False, True):
            answer = asking.post("/v1/score", json=one("Hello") | {"partial": partial})
            assert answer.status_code == 200, answer.text
            said = answer.json()
            assert said["std"] == [None] and said["members"] == [[most, -most]]
            assert said["rewards"] == ensemble.score([Sample("Hi", "Hello")]).reward.tolist()


@pytest.mark.parametrize("scores", [(1e200, -1e200), (1.5e308, 1.4e308)])
def test_openrlhfs_logs_hold_finite_numbers_or_the_request_has_an_error(
    scores: tuple[float, float],
) -> None:
    """Its trainer collects the same keys of all answers: one cannot be left out."""
    ensemble = giving(*scores).with_aggregator(make_aggregator("minimum"))
    with client(ensemble, RAW) as asking:
        answer = asking.post("/get_reward", json={"query": ["Hello"] * 2})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "NonFiniteScoreError")
    assert "sample 0" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("score", "fits"), [(3e38, True), (1e39, False), (-1e200, False)])
def test_an_embedding_in_base64_is_a_float32_or_the_request_has_an_error(
    score: float, fits: bool
) -> None:
    body = {"input": "Hello", "encoding_format": "base64"}
    with client(giving(score), ServerOptions(raw_text=RawText(raw_text_members=("m0",)))) as asking:
        answer = asking.post("/v1/embeddings", json=body)
        assert asking.post("/v1/embeddings", json={"input": "Hello"}).status_code == 200
    if fits:
        assert answer.status_code == 200
    else:
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "NonFiniteScoreError")


def test_a_margin_that_is_beyond_a_float_is_an_error_of_its_name() -> None:
    huge = {"high": 1.5e308, "low": -1.5e308}
    first = FunctionScorer("m0", lambda s: huge.get(s.completion, float(len(s.completion))))
    ensemble = RewardEnsemble((first,), Normaliser.identity(1), mean())
    sides = [Preference("q", "long" * (i % 7 + 2), "no") for i in range(60)]
    sides += [Preference("q", "no", "long" * (i % 3 + 1)) for i in range(30)]
    fine = {"prompt": "q", "first": "yes", "second": "no"}
    with client(ensemble.calibrate(Preferences(tuple(sides)))) as asking:
        pairs = [fine, fine | {"first": "high", "second": "low"}]
        answer = asking.post("/v1/compare", json={"pairs": pairs})
        assert asking.post("/v1/compare", json={"pairs": [fine]}).status_code == 200
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "NonFiniteScoreError")
    assert "sample 2" in answer.json()["error"]["message"]  # the sides are 2 and 3


# What is nobody's mistake -------------------------------------------------------------------------


def test_a_panic_in_a_member_costs_its_request_alone() -> None:
    class PanicError(BaseException):
        """As those of libraries in Rust, which are no `Exception`."""

    def panicking(sample: Sample) -> float:
        if "panic" in sample.completion:
            raise PanicError("index out of range")
        return length(sample)

    ensemble = RewardEnsemble((FunctionScorer("a", panicking),), Normaliser.identity(1), mean())
    with client(ensemble) as asking:
        answer = asking.post("/v1/score", json=one("panic"))
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "RuntimeError")
        assert asking.post("/v1/score", json=one("Hello")).json()["rewards"] == [5.0]
        assert asking.get("/ready").status_code == 200


def test_a_server_that_scores_no_more_is_not_ready() -> None:
    with client(lengths()) as asking:
        service = asking.app.state.service  # type: ignore[attr-defined]
        assert asking.portal is not None
        asking.portal.call(service.batcher.abandon)
        for answer in (asking.get("/ready"), asking.post("/v1/score", json=one("Hello"))):
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "NotReadyError")
        assert "ensemble_rm_ready 0.0" in asking.get("/metrics").text
        assert asking.get("/health").status_code == 200
