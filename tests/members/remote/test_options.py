"""A remote member's self-test, its secrets, its options, and how it is saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from ensemble_rm import (
    FunctionScorer,
    Message,
    Preference,
    Preferences,
    RewardEnsemble,
    Sample,
    combine,
)
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import (
    MissingExtraError,
    ModelError,
    OptionError,
    RemoteActivationError,
    RemoteActivationWarning,
    StorageError,
)
from ensemble_rm.members import ClientOptions, RemoteScorer
from ensemble_rm.members.scorer import with_tokens_of
from tests.support import wire_doubles as doubles
from tests.support.remote_members import SECRET, member, openrlhf, samples

# The self-test -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "word"),
    [
        (lambda text: doubles.sigmoid(doubles.logit_of(text)), "sigmoid"),
        (lambda text: 1.0, "softmax over one logit"),
        (lambda text: -3.25, "all 8 probes score -3.25"),
        (lambda text: None, "no score"),
    ],
)
def test_scores_that_are_no_raw_logits_are_named(score: Callable[[str], Any], word: str) -> None:
    if word != "no score":
        with pytest.warns(RemoteActivationWarning, match=word):
            member(openrlhf(score), raw_logit_check="warn").score(samples(1))
        with pytest.raises(RemoteActivationError, match=word):
            member(openrlhf(score), raw_logit_check="error").score(samples(1))
    assert word in member(openrlhf(score)).raw_logit_check().problems[0]


def test_raw_logits_pass_once() -> None:
    asked: list[str] = []

    def score(text: str) -> float:
        asked.append(text)
        return doubles.logit_of(text)

    scorer = member(openrlhf(score), raw_logit_check="error")
    scorer.score(samples(2))
    assert len(asked) == 2 * 8 + 2
    scorer.score(samples(2))
    assert len(asked) == 2 * 8 + 4


def test_scores_that_follow_the_place_and_not_the_text_are_named() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        n = len(json.loads(request.content)["query"])
        return httpx.Response(200, json={"rewards": [3.0 * i for i in range(n)]})

    report = member(httpx.MockTransport(handle)).raw_logit_check()
    assert "reverse order" in report.problems[0]


@pytest.mark.parametrize(("protocol", "app"), [("sglang", doubles.sglang), ("tei", doubles.tei)])
def test_the_doubles_pass(protocol: str, app: Callable[[], Any]) -> None:
    with doubles.serving(app()) as url:
        scorer = RemoteScorer(
            url, protocol=protocol, name="far", template="plain", raw_logit_check="error"
        )
        assert scorer.raw_logit_check().problems == ()


# Secrets, options, storage -----------------------------------------------------------------------


def test_a_token_is_sent_and_never_kept(tmp_path: Path) -> None:
    seen: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200, json={"rewards": [2.0]})

    scorer = member(httpx.MockTransport(handle), token=SECRET)
    scorer.score(samples(1))
    assert seen == [f"Bearer {SECRET}"]
    saved = member(token=SECRET)
    saved.save(tmp_path / "m")
    assert SECRET not in (tmp_path / "m" / "member.json").read_text()
    assert SECRET not in repr(saved) and SECRET not in json.dumps(saved.describe())
    assert RemoteScorer.load(tmp_path / "m").token is None


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "ü"])
def test_a_token_that_cannot_be_one_is_refused_unshown(token: str) -> None:
    with pytest.raises(OptionError, match="token") as found:
        member(token=token)
    assert not token or token not in str(found.value)


@pytest.mark.parametrize(
    "url",
    [
        *("", "far", "ftp://x", "http://", f"http://user:{SECRET}@far.test", "http://x:99999"),
        *(f"https://far.test/rm?key={SECRET}", f"https://far.test/rm#{SECRET}", "http://[::1"),
    ],
)
def test_an_address_with_a_secret_or_none_is_refused(url: str) -> None:
    with pytest.raises(OptionError) as found:
        RemoteScorer(url, protocol="tei", name="far", template="plain")
    assert SECRET not in str(found.value)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://far.test", "http://far.test/get_reward"),
        ("http://far.test/rm/", "http://far.test/rm/get_reward"),
        ("http://far.test/rm/get_reward", "http://far.test/rm/get_reward"),
    ],
)
def test_the_protocols_path_is_added_once(url: str, asked: str) -> None:
    seen: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200, json={"rewards": [2.0]})

    RemoteScorer(
        url,
        protocol="openrlhf",
        name="far",
        template="plain",
        raw_logit_check="off",
        transport=httpx.MockTransport(handle),
    ).score(samples(1))
    assert seen == [asked]


def test_it_is_saved_and_joins_an_ensemble(tmp_path: Path) -> None:
    """A saved one-member ensemble, combined with a local scorer, saved, loaded: the same scores."""
    pairs = Preferences(tuple(Preference(f"p{i}", f"yes {i}", f"no {i}") for i in range(6)))
    with doubles.serving(doubles.vllm()) as url:
        scorer = RemoteScorer(
            url,
            protocol="vllm-classify",
            name="far",
            template="messages",
            client=ClientOptions(concurrency=3),
        )
        alone = RewardEnsemble((scorer,), Normaliser.identity(1), mean())
        alone.save_pretrained(tmp_path / "far")
        both = combine({"big": tmp_path / "far"}, pairs, allow_remote=["127.0.0.1"])
        both.save_pretrained(tmp_path / "both")
        again = RewardEnsemble.from_pretrained(tmp_path / "both", allow_remote=[url])
        assert again.names == ("big/far",)
        texts = [Sample((Message("user", "p"),), "yes"), Sample("q", "no")]
        assert again.score(texts).members.tolist() == both.score(texts).members.tolist()
        assert again.score(texts).raw.tolist() == alone.score(texts).raw.tolist()


def test_what_is_python_code_cannot_be_saved(tmp_path: Path) -> None:
    for scorer in (member(openrlhf(float)), member(template=lambda sample: sample.completion)):
        with pytest.raises(StorageError, match="Python code"):
            scorer.save(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "remote", "url": 3, "client": {}}'])
def test_a_damaged_folder_is_a_storage_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "member.json").write_text(text)
    with pytest.raises(StorageError, match="remote member"):
        RemoteScorer.load(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        *({"protocol": "grpc"}, {"template": "chat"}, {"template": "plain", "tokenizer": "x"}),
        *({"batch_size": 0}, {"truncate": True}, {"raw_logit_check": "no"}, {"on_outage": "zero"}),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        member(**options)


def test_without_httpx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(MissingExtraError, match="remote"):
        member()


def test_a_chat_template_has_no_second_bos(tiny_policy: Path) -> None:
    """TEI and SGLang add special tokens to every text: the template's own BOS would be doubled."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tiny_policy)
    seen: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append(body)
        if "query" in body:
            return httpx.Response(200, json={"rewards": [2.0]})
        if "inputs" in body:
            return httpx.Response(200, json=[[{"score": 2.0, "label": "x"}]])
        data = [{"index": 0, "probs": [2.0]}]
        return httpx.Response(200, json={"data": data})

    for protocol in ("tei", "vllm-classify", "openrlhf"):
        member(
            httpx.MockTransport(handle), protocol=protocol, template="chat", tokenizer=tiny_policy
        ).score([Sample("Hi", "Hello.")])
    whole = "user: Hi\nassistant: Hello.\n"
    assert seen[0]["inputs"] == [[whole]]  # the tokenizer adds [CLS] itself
    assert seen[1]["input"] == [tokenizer.bos_token + whole]
    assert seen[1]["add_special_tokens"] is False
    assert seen[2]["query"] == [tokenizer.bos_token + whole]
    assert seen[2]["prompts"] == [f"{tokenizer.bos_token}user: Hi\nassistant: "]


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        member(openrlhf(float), template="chat", tokenizer=tmp_path / "none").score(samples(1))


def test_a_member_that_is_forgotten_leaves_nothing_behind() -> None:
    import gc
    import threading

    before = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer = member(openrlhf(float))
        scorer.score(samples(2))
        del scorer
        gc.collect()
    left = set(threading.enumerate()) - before
    for thread in left:  # a collection waits for nobody
        thread.join(60)
    assert not any(thread.is_alive() for thread in left)


def test_a_version_that_is_read_anew_keeps_the_tokens_of_the_one_before() -> None:
    """What `refresh` and a server's reload do: nothing that is saved holds a token."""
    seen: list[str | None] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200, json={"rewards": [2.0]})

    transport = httpx.MockTransport(handle)
    near = FunctionScorer("near", lambda sample: 1.0)
    old = (near, member(token=SECRET))
    for scorer in with_tokens_of((near, member(transport)), old):
        scorer.score(samples(1))
    other = RemoteScorer(
        "http://other.test",
        protocol="openrlhf",
        name="o",
        template="plain",
        raw_logit_check="off",
        transport=transport,
    )
    (other_again,) = with_tokens_of((other,), old)
    other_again.score(samples(1))
    assert seen == [f"Bearer {SECRET}", None]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": "one", "b": "two"}, "ab", ["one", "two"]),
        ({"a": "one", "b": "two"}, "ba", ["two", "one"]),
        ({"a": "one", "b": None}, "ab", ["one", None]),
        ({"a": "one", "b": "two"}, "ac", ["one", None]),  # whose c's would be nobody knows
        ({"a": "one", "b": None}, "c", ["one"]),
        ({"a": "one", "b": "one"}, "c", ["one"]),
    ],
)
def test_members_at_one_address_keep_their_own_tokens(
    old: dict[str, str | None], new: str, expected: list[str | None]
) -> None:
    def at_gateway(name: str, token: str | None) -> RemoteScorer:
        return RemoteScorer(
            "http://gateway.test",
            protocol="vllm-classify",
            name=name,
            template="plain",
            token=token,
        )

    before = [at_gateway(name, token) for name, token in old.items()]
    after = [at_gateway(name, None) for name in new]
    found = [one.token for one in with_tokens_of(after, before) if isinstance(one, RemoteScorer)]
    assert found == expected
