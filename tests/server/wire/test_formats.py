"""The wire formats: each client's own request, and what that client reads of the answer.

The calls are those of the released packages' sources: openrlhf 0.11.0 `utils/agent.py`, verl 0.9.0
`experimental/reward_loop/reward_loop.py`, vllm 0.33 and sglang 0.5 protocols, llamafactory 0.9.5
`train/ppo/ppo_utils.py`.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from ensemble_rm import Calibration, Preference, Preferences, RewardEnsemble
from ensemble_rm.aggregation import lcb
from ensemble_rm.server.options import ServerOptions
from ensemble_rm.server.wire.raw_text import RawText
from ensemble_rm.uncertainty.disagreement import split_uncertainty
from tests.support import wire_doubles as doubles
from tests.support.server_process import lengths
from tests.support.server_runs import client, one

CHAT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
TEXT = f"{CHAT}Hello<|im_end|>"
MESSAGES = [{"role": "user", "content": "Hi"}]
ANSWER = {"role": "assistant", "content": "Hello"}
OPTIONS = ServerOptions(name="lengths", raw_text=RawText(policy_template="chatml"))
HELLO = 7.5  # the mean of 5 and 10


@pytest.fixture(scope="module")
def asking() -> Iterator[TestClient]:
    with client(lengths(), OPTIONS) as found:
        yield found


def calibrated() -> RewardEnsemble:
    rng = np.random.default_rng(0)
    pairs = [Preference("Hi", "long" * int(n), "no") for n in rng.integers(1, 9, size=60)]
    pairs += [Preference("Hi", "no", "long" * int(n)) for n in rng.integers(1, 3, size=30)]
    return lengths().calibrate(Preferences(tuple(pairs)))


# Ours ------------------------------------------------------------------------------------------


def test_scores_are_the_ensembles(asking: TestClient) -> None:
    body = {"samples": [one("Hello")["samples"][0], {"prompt": MESSAGES, "completion": ""}]}
    answer = asking.post("/v1/score", json=body)
    said = answer.json()
    assert said["rewards"] == [HELLO, 0.0]
    assert said["names"] == ["length", "twice"]
    assert said["members"] == said["raw"] == [[5.0, 10.0], [0.0, 0.0]]
    assert said["std"] == pytest.approx([np.std([5, 10], ddof=1), 0.0])
    assert said["truncated"] == [False, False] and said["errors"] == [None, None]
    assert said["version"] == answer.headers["x-ensemble-version"]
    assert said["aggregator"] == "mean()"


def test_a_request_may_choose_its_aggregator(asking: TestClient) -> None:
    body = one("Hello") | {"aggregator": {"name": "lcb", "kappa": 0.5}}
    said = asking.post("/v1/score", json=body).json()
    assert said["rewards"] == pytest.approx(lcb(kappa=0.5)(np.array([[5.0, 10.0]])))
    assert said["aggregator"] == str(lcb(kappa=0.5))
    for wrong in ({"name": "lcb"}, {"name": "most"}, {"name": "lcb", "kappa": -1}, {"kappa": 1}):
        assert asking.post("/v1/score", json=body | {"aggregator": wrong}).status_code == 422


def test_a_failed_sample_is_an_error_and_nobody_elses(asking: TestClient) -> None:
    body = {"samples": [{"prompt": "Hi", "completion": c} for c in ("Hello", "bad", "Yes")]}
    answer = asking.post("/v1/score", json=body)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "NonFiniteScoreError"
    assert "sample 1" in answer.json()["error"]["message"] and "rewards" not in answer.json()
    said = asking.post("/v1/score", json=body | {"partial": True}).json()
    assert said["rewards"] == [HELLO, None, 4.5]
    assert said["errors"] == [None, "NonFiniteScoreError", None]
    assert said["members"][1] is None


def test_comparisons_are_the_ensembles() -> None:
    ensemble = calibrated()
    with client(ensemble, OPTIONS) as asking:
        pairs = [{"prompt": "Hi", "first": "Hello", "second": "No"}]
        pairs += [{"prompt": "Hi", "first": "No", "second": "Hello"}]
        said = asking.post("/v1/compare", json={"pairs": pairs}).json()
    own = ensemble.compare(["Hi"] * 2, ["Hello", "No"], ["No", "Hello"])
    assert said["probability"] == own.probability.tolist()
    assert sum(said["probability"]) == pytest.approx(1)
    assert said["margin"] == own.margin.tolist()
    assert said["epistemic"] == own.epistemic.tolist()
    assert said["aleatoric"] == own.aleatoric.tolist()
    assert said["tie_probability"] is None


def test_without_a_calibration_there_is_no_probability(asking: TestClient) -> None:
    body = {"pairs": [{"prompt": "Hi", "first": "a", "second": "b"}]}
    answer = asking.post("/v1/compare", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (409, "NotCalibratedError")


def test_one_member_has_no_spread() -> None:
    alone = lengths()
    alone = replace(alone, scorers=alone.scorers[:1], normaliser=alone.normaliser.identity(1))
    with client(alone, OPTIONS) as asking:
        said = asking.post("/v1/score", json=one("Hello")).json()
        assert said["std"] is None and said["rewards"] == [5.0]
        logs = as_openrlhf(asking, [TEXT], [CHAT], ["4"])["extra_logs"]
        assert set(logs) == {"member_mean"}


# OpenRLHF --------------------------------------------------------------------------------------


def as_openrlhf(
    asking: TestClient, queries: list[str], prompts: list[str], labels: list[Any]
) -> dict[str, Any]:
    """`SingleTurnAgentExecutor._fetch_rewards_via_http`'s payload; raises as it does."""
    answer = asking.post(
        "/get_reward", json={"query": queries, "prompts": prompts, "labels": labels}
    )
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def test_openrlhf_gets_lists_of_numbers(asking: TestClient) -> None:
    said = as_openrlhf(asking, [TEXT], [CHAT], [json.dumps(MESSAGES)])
    assert said["rewards"] == said["scores"] == [HELLO]
    assert said["extra_logs"] == {"member_mean": [HELLO], "member_std": pytest.approx([3.5355339])}
    several = as_openrlhf(asking, [TEXT, f"{CHAT}Yes"], [CHAT] * 2, ["4", None])
    assert several["rewards"] == [HELLO, 4.5]


def test_openrlhf_lists_of_unequal_length_are_refused(asking: TestClient) -> None:
    body = {"query": [TEXT], "prompts": [CHAT, CHAT], "labels": ["4"]}
    assert asking.post("/get_reward", json=body).status_code == 422


# vLLM and SGLang, as veRL and others ask them ----------------------------------------------------


def test_verl_reads_a_reward_of_vllm(asking: TestClient) -> None:
    body = {"model": "any", "input": TEXT, "use_activation": False}
    output = asking.post("/classify", json=body).json()
    assert output["data"][-1]["probs"][-1] == HELLO
    assert output["object"] == "list" and output["id"].startswith("classify-")
    assert output["data"][0] | {"probs": []} == {
        "index": 0,
        "label": "LABEL_0",
        "probs": [],
        "num_classes": 1,
    }
    assert set(output) == {"id", "object", "created", "model", "data", "usage"}


def test_an_answer_has_the_keys_of_vllms_own_in_their_order(asking: TestClient) -> None:
    """The double is held against a real server in test_remote_vllm.py."""
    for body in ({"input": TEXT}, {"input": [TEXT, TEXT], "use_activation": False}):
        ours = asking.post("/classify", json=body).json()
        theirs = TestClient(doubles.vllm()).post("/classify", json=body).json()
        assert list(ours) == list(theirs)
        assert list(ours["usage"]) == list(theirs["usage"])
        assert [list(row) for row in ours["data"]] == [list(row) for row in theirs["data"]]


@pytest.mark.parametrize("activation", [{}, {"use_activation": None}, {"use_activation": True}])
def test_vllm_applies_a_sigmoid_unless_it_is_told_not_to(
    asking: TestClient, activation: dict[str, Any]
) -> None:
    said = asking.post("/classify", json={"input": [TEXT, f"{CHAT}Yes"]} | activation).json()
    found = [row["probs"][0] for row in said["data"]]
    assert found == pytest.approx([1 / (1 + np.exp(-HELLO)), 1 / (1 + np.exp(-4.5))])
    assert [row["index"] for row in said["data"]] == [0, 1]


def test_vllm_takes_messages(asking: TestClient) -> None:
    turns = [*MESSAGES, {"role": "assistant", "content": "Hello"}]
    body = {"messages": turns, "use_activation": False}
    assert asking.post("/classify", json=body).json()["data"][0]["probs"] == [HELLO]
    assert asking.post("/classify", json={"messages": [turns[1], turns[0]]}).status_code == 422


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_sglang_answers_alone_or_in_a_list(asking: TestClient, method: str) -> None:
    alone = asking.request(method, "/classify", json={"text": TEXT})
    assert alone.json()["embedding"] == [HELLO]
    version = alone.headers["x-ensemble-version"]
    assert alone.json()["meta_info"]["weight_version"] == version
    listed = asking.request(method, "/classify", json={"text": [TEXT]}).json()
    assert [row["embedding"] for row in listed] == [[HELLO]]


def test_verl_reads_a_reward_of_sglang(asking: TestClient) -> None:
    output = asking.post("/v1/embeddings", json={"model": "any", "input": TEXT}).json()
    assert output["data"][-1]["embedding"][-1] == HELLO
    soft = TestClient(doubles.sglang()).post("/v1/classify", json={"input": TEXT}).json()
    assert list(output["usage"]) == list(soft["usage"])
    body = {"model": "any", "input": [TEXT], "encoding_format": "base64"}
    packed = asking.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert struct.unpack("<f", base64.b64decode(packed)) == (HELLO,)


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"input": TEXT, "text": TEXT},
        {"input": [1, 2]},
        {"input": [[1, 2]]},
        {"input_ids": [1, 2]},
        {"text": [[TEXT, TEXT]]},
        {"input": "Hello"},
        {"text": []},
    ],
)
def test_what_classify_cannot_read_is_refused(asking: TestClient, body: Any) -> None:
    assert asking.post("/classify", json=body).status_code == 422


# LLaMA-Factory ---------------------------------------------------------------------------------


def as_llamafactory(asking: TestClient, messages: list[str]) -> list[float]:
    """`get_rewards_from_server`: no look at the status."""
    headers = {"Content-Type": "application/json"}
    payload = {"model": "model", "messages": messages}
    response = asking.post("/v1/score/evaluation", json=payload, headers=headers)
    found: list[float] = json.loads(response.text)["scores"]
    return found


def test_llamafactory_gets_scores_and_never_an_errors(asking: TestClient) -> None:
    assert as_llamafactory(asking, [TEXT, f"{CHAT}Yes"]) == [HELLO, 4.5]
    with pytest.raises(KeyError):
        as_llamafactory(asking, [f"{CHAT}bad"])


# Beside scoring --------------------------------------------------------------------------------


def test_models_health_ready_metrics(asking: TestClient) -> None:
    models = asking.get("/v1/models").json()
    assert [card["id"] for card in models["data"]] == ["lengths"]
    assert asking.get("/health").json() == {"status": "alive"}
    assert asking.get("/ready").json()["status"] == "ready"
    asking.post("/v1/score", json=one("Hello"))
    for path in ("/health", "/ready"):  # some balancers ask for no body
        assert asking.head(path).status_code == 200
        assert "head" not in asking.get("/openapi.json").json()["paths"][path]
    text = asking.get("/metrics").text
    for name in (
        "requests_total",
        "batch_samples_bucket",
        "queue_samples",
        "scoring_seconds_total",
    ):
        assert f"ensemble_rm_{name}" in text
    assert 'version_info{version="' in text and "Hello" not in text


def test_every_example_of_the_description_is_answered() -> None:
    with client(calibrated(), OPTIONS) as asking:
        described = asking.get("/openapi.json").json()
        asked = 0
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                content = operation.get("requestBody", {}).get("content", {})
                for example in content.get("application/json", {}).get("examples", {}).values():
                    answer = asking.request(method, path, json=example["value"])
                    assert answer.status_code == 200, (path, answer.text)
                    asked += 1
    assert asked == 12


def test_uncertainty_of_an_answer_is_the_mixtures() -> None:
    ensemble = calibrated()
    calibration = ensemble.calibration
    assert isinstance(calibration, Calibration)
    with client(ensemble, OPTIONS) as asking:
        pair = {"prompt": "Hi", "first": "Hello", "second": "No"}
        said = asking.post("/v1/compare", json={"pairs": [pair]}).json()
    split = split_uncertainty([[3.0, 6.0]], mixture_temperature=calibration.mixture_temperature)
    assert said["epistemic"] == pytest.approx(split.epistemic)


# vLLM's older names of use_activation ------------------------------------------------------------


@pytest.mark.parametrize("name", ["use_activation", "activation", "softmax"])
@pytest.mark.parametrize("body", [{"input": TEXT}, {"messages": [*MESSAGES, ANSWER]}])
def test_every_name_of_the_activation_is_honoured(
    asking: TestClient, name: str, body: dict[str, Any]
) -> None:
    def probability(**fields: bool) -> float:
        answer = asking.post("/classify", json=body | fields)
        assert answer.status_code == 200, answer.text
        return float(answer.json()["data"][0]["probs"][0])

    assert probability(**{name: False}) == HELLO
    assert probability(**{name: True}) == probability() == pytest.approx(1 / (1 + np.exp(-HELLO)))


def test_contradicting_names_of_the_activation_are_refused(asking: TestClient) -> None:
    body = {"input": TEXT, "use_activation": False, "softmax": True}
    assert asking.post("/classify", json=body).status_code == 422
