"""A real vLLM server as a member, against the same model in transformers, and against its double.

`make vllm` installs one, in an environment of its own.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ensemble_rm import Message, Sample
from ensemble_rm.errors import (
    RemoteActivationError,
    RemoteActivationWarning,
    RemoteFailureWarning,
    RemoteRefusalError,
)
from ensemble_rm.members import ClientOptions, RemoteScorer
from ensemble_rm.members.remote.raw_logit_check import PROBES
from tests.support import wire_doubles as doubles
from tests.support.vllm_server import (
    SPOILED,
    Reference,
    end,
    find_command,
    free_port,
    kill_engine,
    make_decoder,
    make_reference,
    ready,
    running,
)

# One worker runs them all: each worker would start servers of its own.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]

PROTOCOLS = ("vllm-classify", "vllm-pooling")
KEY = "s3cret"
TEXTS = ["a", "b", "hello there", "ünïcode ☃", "", " ", "x, y; z", "one two three " * 60]
SAMPLES = [Sample("ask: ", text) for text in TEXTS]
PLAIN = [f"ask: {text}" for text in TEXTS]
NEAR = {"rtol": 0.0, "atol": 2e-4}  # of two float32 runs whose sums are in another order
FAR = Sample("", "word " * 600)  # of a model that takes 512 tokens


@pytest.fixture(scope="module")
def command() -> str:
    """The vLLM command."""
    return find_command()


@pytest.fixture(scope="module")
def reference(
    command: str,  # no model is made where none can be served
    minilm_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Reference:
    """The served model."""
    return make_reference(minilm_folder, tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def url(command: str, reference: Reference) -> Iterator[str]:
    """A server that is ready."""
    with ready(command, reference.folder, *_exact(reference)) as address:
        yield address


@pytest.fixture(scope="module")
def token_url(command: str, reference: Reference) -> Iterator[str]:
    """A server whose model scores every token, and which has a key."""
    task = json.dumps({"task": "token_classify"})
    more = ["--pooler-config", task, "--api-key", KEY]
    with ready(command, reference.folder, *_exact(reference), *more) as address:
        yield address


def _exact(reference: Reference) -> list[str]:
    chat = str(reference.folder / "chat.jinja")
    return [*reference.options, "--dtype", "float32", "--chat-template", chat]


def scorer(url: str, protocol: str, **options: Any) -> RemoteScorer:
    options = {"template": "plain", "raw_logit_check": "off", "name": "far"} | options
    return RemoteScorer(url, protocol=protocol, **options)


# Scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_raw_logits_arrive_in_order(
    url: str, reference: Reference, protocol: str, batch_size: int
) -> None:
    found = scorer(url, protocol, batch_size=batch_size).score(SAMPLES)
    np.testing.assert_allclose(found[:, 0], reference.logits(PLAIN), **NEAR)
    assert found.min() < 0 or found.max() > 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_order_of_many_under_way_at_once(url: str, reference: Reference, protocol: str) -> None:
    samples = [Sample(f"question {i}: ", f"answer {i * i} " * (1 + i % 7)) for i in range(120)]
    found = scorer(url, protocol, batch_size=4).score(samples)
    texts = [f"{sample.prompt}{sample.completion}" for sample in samples]
    np.testing.assert_allclose(found[:, 0], reference.logits(texts), **NEAR)


def test_special_tokens_are_the_users_choice(url: str, reference: Reference) -> None:
    found = scorer(url, "vllm-classify", special_tokens=False).score(SAMPLES)
    np.testing.assert_allclose(found[:, 0], reference.logits(PLAIN, special=False), **NEAR)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_messages_are_rendered_by_the_server(url: str, reference: Reference, protocol: str) -> None:
    turns = (Message("system", "Be brief."), Message("user", "Hi"))
    samples = [Sample(turns, "Hello."), Sample("Hi", "Hello."), Sample("Hi", "No.")]
    found = scorer(url, protocol, template="messages").score(samples)
    texts = ["<|system|>Be brief.<|user|>Hi<|assistant|>Hello."]
    texts += [f"<|user|>Hi<|assistant|>{text}" for text in ("Hello.", "No.")]
    np.testing.assert_allclose(found[:, 0], reference.logits(texts, special=False), **NEAR)


def test_of_a_model_that_scores_every_token_the_last_counts(
    token_url: str, reference: Reference
) -> None:
    import torch

    found = scorer(token_url, "vllm-pooling").score(SAMPLES)
    expected = []
    for text in PLAIN:
        with torch.no_grad():
            inputs = reference.tokenizer(text, return_tensors="pt")
            states = reference.model.bert(**inputs).last_hidden_state
            expected.append(reference.model.classifier(states[0, -1])[0].item())
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=NEAR["atol"])


# Decoders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-3), ("bfloat16", 2.0)])
def test_a_decoder_is_scored_at_its_last_token(
    command: str, smollm2_folder: Path, tmp_path: Path, dtype: str, near: float
) -> None:
    """A language model with a head is what vLLM is for; in bfloat16 such a head drifts by one."""
    decoder = make_decoder(smollm2_folder, tmp_path)
    served = [*decoder.options, "--dtype", dtype, "--max-model-len", "512"]
    turns = (Message("system", "Be brief."), Message("user", "How do I boil an egg?"))
    texts = ["Seven minutes in boiling water.", "No.", "egg " * 100]
    with ready(command, tmp_path, *served) as address:
        member = scorer(
            address, "vllm-classify", template="chat", tokenizer=tmp_path, raw_logit_check="error"
        )
        found = member.score([Sample(turns, text) for text in texts])
        there = scorer(address, "vllm-pooling", template="messages").score(
            [Sample(turns, text) for text in texts]
        )
        member.close()
    asked = [{"role": turn.role, "content": turn.content} for turn in turns]
    rendered = [
        decoder.tokenizer.apply_chat_template(
            [*asked, {"role": "assistant", "content": text}], tokenize=False
        )
        for text in texts
    ]
    expected = decoder.logits(rendered, special=False)
    assert np.ptp(expected) > 5
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=near)
    np.testing.assert_allclose(there, found, rtol=0, atol=near)


# Refusals ----------------------------------------------------------------------------------------


def test_an_unknown_model_is_refused(url: str) -> None:
    with pytest.raises(RemoteRefusalError, match=r"404.*does not exist"):
        scorer(url, "vllm-classify", model="another").score(SAMPLES)
    assert np.isfinite(scorer(url, "vllm-classify", model="reward").score(SAMPLES)).all()


def test_a_server_without_the_protocol_is_refused_at_once(token_url: str) -> None:
    with pytest.raises(RemoteRefusalError, match=r"501.*does not support Classification"):
        scorer(token_url, "vllm-classify").score(SAMPLES)
    real, double = _asked_both(token_url, "/classify", {"input": "a"}, doubles.vllm(tokens=True))
    assert double.status_code == real.status_code
    assert_alike(double.json(), real.json())


def test_the_servers_own_key_does_not_guard_its_scores(token_url: str) -> None:
    """As docs/guides/remote.md says: a proxy has to."""
    assert httpx.get(f"{token_url}/v1/models").status_code == 401
    assert np.isfinite(scorer(token_url, "vllm-pooling").score(SAMPLES)).all()
    assert np.isfinite(scorer(token_url, "vllm-pooling", token=KEY).score(SAMPLES)).all()


# The activation ----------------------------------------------------------------------------------


class Naive(httpx.AsyncHTTPTransport):
    """The network, for a client that does not ask for raw logits."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        del body["use_activation"]
        return await super().handle_async_request(httpx.Request("POST", request.url, json=body))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_who_does_not_ask_gets_a_sigmoid(url: str, reference: Reference, protocol: str) -> None:
    """The trap is there, and the self-test finds it."""
    found = scorer(url, protocol, transport=Naive()).score(SAMPLES)
    expected = 1 / (1 + np.exp(-reference.logits(PLAIN)))
    np.testing.assert_allclose(found[:, 0], expected, **NEAR)
    with pytest.raises(RemoteActivationError, match="sigmoid"):
        scorer(url, protocol, transport=Naive(), raw_logit_check="error").score(SAMPLES)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_raw_logits_pass_the_raw_logit_check(url: str, reference: Reference, protocol: str) -> None:
    member = scorer(url, protocol, raw_logit_check="warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RemoteActivationWarning)
        report = member.raw_logit_check()
    assert report.problems == ()
    texts = [f"{sample.prompt}{sample.completion}" for sample in PROBES]
    np.testing.assert_allclose(report.scores, reference.logits(texts), **NEAR)


# Samples that have no score ----------------------------------------------------------------------


def test_a_sample_that_is_too_long(url: str, reference: Reference) -> None:
    """Rejected for itself alone; cut by the server, from the right, only where that is asked."""
    samples = [Sample("", "a"), FAR, Sample("", "b"), Sample("", "c")]
    texts = [sample.completion for sample in samples]
    expected = reference.logits(texts)
    member = scorer(url, "vllm-classify")
    with pytest.warns(RemoteFailureWarning, match=r"1 of 4.*status 400"):  # and no word of the text
        found = member.score(samples)[:, 0]
    reason = str(member.score_detailed(samples).errors.get(1))
    assert reason is not None and "maximum context length is 512" in reason
    assert np.isnan(found).tolist() == [False, True, False, False]
    np.testing.assert_allclose(found[[0, 2, 3]], expected[[0, 2, 3]], **NEAR)
    cut = scorer(url, "vllm-classify", truncate=True).score(samples)
    np.testing.assert_allclose(cut[:, 0], expected, **NEAR)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("bad", range(5))
def test_a_nan_of_the_model_is_no_score(
    url: str, reference: Reference, protocol: str, bad: int
) -> None:
    """NaN for that sample alone, whether the server rejects the batch or answers null."""
    texts = [f"p {text}" for text in "abcde"]
    texts[bad] += f" {SPOILED}"
    others = [i for i in range(5) if i != bad]
    with pytest.warns(RemoteFailureWarning, match="1 of 5"):
        found = scorer(url, protocol).score([Sample("", text) for text in texts])[:, 0]
    assert np.isnan(found[bad])
    expected = reference.logits([texts[i] for i in others])
    np.testing.assert_allclose(found[others], expected, **NEAR)


# The double --------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
REQUESTS: dict[str, dict[str, Any]] = {
    "one text": {"input": "ask: a"},
    "raw": {"input": ["ask: a", "ask: b"], "use_activation": False},
    "named": {"input": ["ask: a"], "model": "reward"},
    "unknown model": {"input": ["ask: a"], "model": "another"},
    "messages": {"messages": MESSAGES, "add_special_tokens": True, "use_activation": False},
    "too long": {"input": ["a", FAR.completion]},
    "cut": {"input": ["a", FAR.completion], "truncate_prompt_tokens": -1},
    "a NaN": {"input": ["a", SPOILED], "use_activation": False},
    "a NaN activated": {"input": ["a", SPOILED]},
    "no text": {"input": []},
    "nothing": {},
    "a number": {"input": 3},
    "an empty text": {"input": ["", "a"]},
    "an empty text alone": {"input": ["", "a"], "add_special_tokens": False},
    "a task that was removed": {"input": "a", "task": "score"},
    "a parameter that was removed": {"input": "a", "normalize": False},
}


def assert_alike(double: Any, real: Any) -> None:
    """The same keys in their order and the same values; numbers nearly."""
    assert type(double) is type(real)
    if isinstance(real, dict):
        assert list(double) == list(real)
        pydantic = real.get("type") == "Bad Request"  # whose words are its own
        for key, value in real.items():
            if key == "id":
                assert double[key].split("-")[0] == value.split("-")[0]
                assert len(double[key]) == len(value)
            elif key != "created" and not (pydantic and key == "message"):
                assert_alike(double[key], value)
    elif isinstance(real, list):
        for one, other in zip(double, real, strict=True):
            assert_alike(one, other)
    elif isinstance(real, float):
        np.testing.assert_allclose(double, real, **NEAR)
    else:
        assert double == real


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
@pytest.mark.parametrize("asked", REQUESTS)
def test_the_double_answers_as_the_server_does(
    url: str, reference: Reference, path: str, asked: str
) -> None:
    """The same status, kind of content, keys in their order, and values."""

    def logit(text: str) -> float:
        return float(reference.logits([text])[0])

    def count(text: str) -> int:
        return len(reference.tokenizer(text).input_ids)

    version = httpx.get(f"{url}/version").json()["version"]
    if path == "/pooling" and "NaN" in asked and version.startswith("0.32."):
        pytest.skip("vLLM 0.32 refuses a NaN here, as in /classify; the double answers as 0.33")
    app = doubles.vllm(logit, count=count, longest=512)
    real, double = _asked_both(url, path, REQUESTS[asked], app)
    assert double.status_code == real.status_code
    assert double.headers["content-type"] == real.headers["content-type"]
    assert_alike(double.json(), real.json())


def _asked_both(
    url: str, path: str, body: dict[str, Any], app: Any
) -> tuple[httpx.Response, httpx.Response]:
    with doubles.serving(app) as address:
        return httpx.post(url + path, json=body), httpx.post(address + path, json=body)


# Failures ----------------------------------------------------------------------------------------

CLIENTS, CALLS, EACH = 4, 6, 6


ENDS = ("killed", "stopped", "its engine killed")


def test_a_server_that_ends_and_comes_back_costs_no_score(
    command: str, reference: Reference
) -> None:
    """All of it; asked to end; or only its engine, whose server answers 500 and ends itself."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    member = scorer(
        address,
        "vllm-classify",
        batch_size=2,
        # A server that is asked to end may leave a request without an answer.
        client=ClientOptions(
            timeout=20, backoff=0.05, max_backoff=1.0, reset_after=0.5, deadline=550
        ),
    )
    found: dict[tuple[int, int], list[float]] = {}
    done, ended = threading.Semaphore(0), [threading.Event() for _ in ENDS]

    def load(client: int) -> None:
        for call in range(CALLS * len(ENDS)):
            if call % CALLS == CALLS - 1:  # no client is through before the server ends
                assert ended[call // CALLS].wait(1200)
            samples = [Sample("", f"{client} {call} {i}") for i in range(EACH)]
            found[client, call] = member.score(samples)[:, 0].tolist()
            done.release()

    threads = [threading.Thread(target=load, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    answered = 0
    for life, how in enumerate(ENDS):
        with running(command, reference.folder, port, *_exact(reference)) as process:
            until = CLIENTS * CALLS * life + CLIENTS * CALLS // 3
            for _ in range(until - answered):
                assert done.acquire(timeout=600)
            answered = until
            if how == "its engine killed":
                kill_engine(process)
                process.wait(timeout=300)
            elif how == "stopped":
                process.terminate()
                process.wait(timeout=300)
            end(process)
            assert all(thread.is_alive() for thread in threads)  # it ended in mid-load
        ended[life].set()
    with running(command, reference.folder, port, *_exact(reference)):
        for thread in threads:
            thread.join(timeout=600)
        assert not any(thread.is_alive() for thread in threads)
        member.close()
    for (client, call), scores in found.items():
        texts = [f"{client} {call} {i}" for i in range(EACH)]
        np.testing.assert_allclose(scores, reference.logits(texts), **NEAR)
    assert len(found) == CLIENTS * CALLS * len(ENDS)
