"""A remote member keeps the scorer's law: samples in, raw scores out, each in its place or NaN."""

from __future__ import annotations

import asyncio
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import wire_doubles as doubles
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_rm import (
    ClientOptions,
    FunctionScorer,
    Message,
    Normaliser,
    Preference,
    Preferences,
    RemoteScorer,
    RewardEnsemble,
    Sample,
    Scorer,
    combine,
    make_aggregator,
    mean,
)
from ensemble_rm.errors import (
    BackboneError,
    MissingExtraError,
    NonFiniteScoreError,
    OptionError,
    RemoteActivationError,
    RemoteActivationWarning,
    RemoteFailureWarning,
    RemoteRefusalError,
    RemoteUnavailableError,
    StorageError,
)
from ensemble_rm.members.scorer import StoredScorer

QUICK = ClientOptions(backoff=1e-4, deadline=0.05, reset_after=0.01)
SECRET = "s3cret-tok3n"


def openrlhf(score: Callable[[str], Any], *, status: int = 200) -> httpx.MockTransport:
    """An OpenRLHF server over any function, in the place of the network."""

    async def handle(request: httpx.Request) -> httpx.Response:
        queries = json.loads(request.content)["query"]
        values = [score(query) for query in queries]
        return httpx.Response(status, content=json.dumps({"rewards": values}))

    return httpx.MockTransport(handle)


def member(transport: Any = None, **options: Any) -> RemoteScorer:
    given: dict[str, Any] = {"template": "plain", "self_test": "off", "name": "far"}
    given |= {"protocol": "openrlhf", "client": QUICK, "transport": transport} | options
    return RemoteScorer("http://far.test", **given)


def samples(n: int) -> list[Sample]:
    return [Sample("", str(i)) for i in range(n)]


def test_it_is_a_scorer_that_can_be_stored() -> None:
    assert isinstance(member(), Scorer) and isinstance(member(), StoredScorer)


@given(n=st.integers(0, 30), size=st.integers(1, 7), places=st.integers(1, 5), seed=st.integers())
@settings(max_examples=25, deadline=None)
def test_scores_keep_their_places_whatever_ends_first(
    n: int, size: int, places: int, seed: int
) -> None:
    """Each batch takes a random time: fast ones overtake slow ones."""
    rng = np.random.default_rng(abs(seed))
    asked: list[str] = []

    async def handle(request: httpx.Request) -> httpx.Response:
        queries = json.loads(request.content)["query"]
        asked.extend(queries)
        for _ in range(int(rng.integers(0, 8))):
            await asyncio.sleep(0)
        return httpx.Response(200, json={"rewards": [float(query) + 0.5 for query in queries]})

    options = ClientOptions(concurrency=places)
    scorer = member(httpx.MockTransport(handle), batch_size=size, client=options)
    found = scorer.score(samples(n))
    scorer.close()
    assert found.tolist() == [[i + 0.5] for i in range(n)]
    assert sorted(asked, key=int) == [str(i) for i in range(n)]  # each asked once


@given(fails=st.lists(st.booleans(), min_size=1, max_size=20), size=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_a_try_that_is_repeated_counts_once(fails: list[bool], size: int) -> None:
    """Some tries are lost on the way there, some answers on the way back."""
    plan = iter(fails)
    found: dict[str, int] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        lost = next(plan, False)
        queries = json.loads(request.content)["query"]
        for query in queries:
            found[query] = found.get(query, 0) + 1
        if lost:
            raise httpx.ReadError("gone")
        return httpx.Response(200, json={"rewards": [float(query) for query in queries]})

    options = ClientOptions(backoff=1e-5, reset_after=1e-4)
    scorer = member(httpx.MockTransport(handle), batch_size=size, client=options)
    assert scorer.score(samples(12))[:, 0].tolist() == [float(i) for i in range(12)]
    scorer.close()
    assert len(found) == 12


@given(bad=st.sets(st.integers(0, 19)), size=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_a_sample_that_fails_fails_alone(bad: set[int], size: int) -> None:
    """A rejected batch is halved until the culprits stand alone."""

    def handle(request: httpx.Request) -> httpx.Response:
        queries = json.loads(request.content)["query"]
        if any(int(query) in bad for query in queries):
            return httpx.Response(422, text="cannot take this")
        return httpx.Response(200, json={"rewards": [float(query) for query in queries]})

    scorer = member(httpx.MockTransport(handle), batch_size=size)
    found = scorer.score_explained(samples(20))
    scorer.close()
    assert {i for i in range(20) if math.isnan(found.scores[i])} == bad
    assert {i for i, reason in enumerate(found.failures) if reason is not None} == bad
    assert all("422" in (found.failures[i] or "") for i in bad)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "2", True])
def test_what_is_no_number_is_nan_and_never_nought(value: Any) -> None:
    scorer = member(openrlhf(lambda text: value if text == "1" else 5.0))
    with pytest.warns(RemoteFailureWarning, match="1 of 3 samples"):
        found = scorer.score(samples(3))[:, 0]
    assert found[0] == found[2] == 5.0 and math.isnan(found[1])


def ensemble(scorer: RemoteScorer, **policy: Any) -> RewardEnsemble:
    near = FunctionScorer("near", lambda sample: 1.0)
    return RewardEnsemble((near, scorer), Normaliser.identity(2), make_aggregator("mean", **policy))


def test_the_aggregators_policy_for_missing_members_applies() -> None:
    scorer = member(openrlhf(lambda text: None if text == "1" else 5.0))
    with pytest.warns(RemoteFailureWarning):
        assert ensemble(scorer, nan="omit").score(samples(3)).reward.tolist() == [3.0, 1.0, 3.0]
    with (
        pytest.warns(RemoteFailureWarning),
        pytest.raises(NonFiniteScoreError, match="row 1 member 1"),
    ):
        ensemble(scorer).score(samples(3))
    with pytest.warns(RemoteFailureWarning), pytest.raises(NonFiniteScoreError):
        ensemble(scorer, nan="omit", min_members=2).score(samples(3))


def unreachable(**options: Any) -> RemoteScorer:
    def handle(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    return member(httpx.MockTransport(handle), **options)


def test_an_outage_is_an_error_or_a_missing_member() -> None:
    with pytest.raises(RemoteUnavailableError, match="refused"):
        unreachable().score(samples(3))
    with pytest.warns(RemoteFailureWarning, match="3 of 3"):
        found = ensemble(unreachable(on_outage="nan"), nan="omit").score(samples(3))
    assert found.reward.tolist() == [1.0, 1.0, 1.0]


def test_an_outage_costs_one_deadline_and_not_one_a_batch() -> None:
    tries = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal tries
        tries += 1
        raise httpx.ConnectError("refused")

    options = ClientOptions(deadline=0.05, reset_after=0.01, backoff=0.01, concurrency=1)
    scorer = member(httpx.MockTransport(handle), batch_size=1, client=options)
    with pytest.raises(RemoteUnavailableError):
        scorer.score(samples(500))
    assert tries < 100


def test_a_refusal_is_an_error_at_once() -> None:
    with pytest.raises(RemoteRefusalError, match="401"):
        member(openrlhf(lambda text: 1.0, status=401)).score(samples(3))


def test_it_scores_inside_a_running_event_loop() -> None:
    scorer = member(openrlhf(float))

    async def loop() -> list[float]:
        return scorer.score(samples(5))[:, 0].tolist()

    assert asyncio.run(loop()) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert scorer.score(samples(2))[:, 0].tolist() == [0.0, 1.0]  # and outside, by the same client


def test_threads_share_a_member() -> None:
    from concurrent.futures import ThreadPoolExecutor

    scorer = member(openrlhf(float), batch_size=2)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: scorer.score(samples(n))[:, 0].tolist(), range(20)))
    assert found == [[float(i) for i in range(n)] for n in range(20)]


def test_a_closed_member_opens_again() -> None:
    with doubles.serving(doubles.openrlhf()) as url:
        scorer = RemoteScorer(
            url, protocol="openrlhf", name="far", template="plain", self_test="off"
        )
        first = scorer.score(samples(3))
        scorer.close()
        assert scorer.score(samples(3)).tolist() == first.tolist()


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
            member(openrlhf(score), self_test="warn").score(samples(1))
        with pytest.raises(RemoteActivationError, match=word):
            member(openrlhf(score), self_test="error").score(samples(1))
    assert word in member(openrlhf(score)).self_test().problems[0]


def test_raw_logits_pass_once() -> None:
    asked: list[str] = []

    def score(text: str) -> float:
        asked.append(text)
        return doubles.logit_of(text)

    scorer = member(openrlhf(score), self_test="error")
    scorer.score(samples(2))
    assert len(asked) == 2 * 8 + 2
    scorer.score(samples(2))
    assert len(asked) == 2 * 8 + 4


def test_scores_that_follow_the_place_and_not_the_text_are_named() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        n = len(json.loads(request.content)["query"])
        return httpx.Response(200, json={"rewards": [3.0 * i for i in range(n)]})

    report = member(httpx.MockTransport(handle)).self_test()
    assert "neighbours" in report.problems[0]


@pytest.mark.parametrize(("protocol", "app"), [("sglang", doubles.sglang), ("tei", doubles.tei)])
def test_the_doubles_pass(protocol: str, app: Callable[[], Any]) -> None:
    with doubles.serving(app()) as url:
        scorer = RemoteScorer(
            url, protocol=protocol, name="far", template="plain", self_test="error"
        )
        assert scorer.self_test().problems == ()


# Secrets, options, storage -----------------------------------------------------------------------


def test_a_token_is_sent_and_never_kept(tmp_path: Path) -> None:
    seen: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200, json={"rewards": [2.0]})

    scorer = member(httpx.MockTransport(handle), token=SECRET)
    scorer.score(samples(1))
    assert seen == [f"Bearer {SECRET}"]
    saved = member(token=SECRET, token_variable="RM_TOKEN")
    saved.save(tmp_path / "m")
    assert SECRET not in (tmp_path / "m" / "member.json").read_text()
    assert SECRET not in repr(saved) and SECRET not in json.dumps(saved.describe())
    assert RemoteScorer.load(tmp_path / "m").token_variable == "RM_TOKEN"


@pytest.mark.parametrize("token", ["", "a b", "a\nb", "ü"])
def test_a_token_that_cannot_be_one_is_refused_unshown(token: str) -> None:
    with pytest.raises(OptionError, match="token") as found:
        member(token=token)
    assert not token or token not in str(found.value)


@pytest.mark.parametrize(
    "url",
    ["", "far", "ftp://x", "http://", f"http://user:{SECRET}@far.test", "http://x:99999"]
    + [f"https://far.test/rm?key={SECRET}", f"https://far.test/rm#{SECRET}", "http://[::1"],
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
        self_test="off",
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
        both = combine({"big": tmp_path / "far"}, pairs)
        both.save_pretrained(tmp_path / "both")
        again = RewardEnsemble.from_pretrained(tmp_path / "both")
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
    [{"protocol": "grpc"}, {"template": "chat"}, {"template": "plain", "tokenizer": "x"}]
    + [{"batch_size": 0}, {"truncate": True}, {"self_test": "no"}, {"on_outage": "zero"}],
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
    )
    tokenizer.save_pretrained(tiny_policy)
    seen: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append(body)
        if "inputs" in body:
            return httpx.Response(200, json=[[{"score": 2.0, "label": "x"}]])
        data = [{"index": 0, "probs": [2.0]}]
        return httpx.Response(200, json={"data": data})

    for protocol in ("tei", "vllm-classify"):
        member(
            httpx.MockTransport(handle), protocol=protocol, template="chat", tokenizer=tiny_policy
        ).score([Sample("Hi", "Hello.")])
    whole = "user: Hi\nassistant: Hello.\n"
    assert seen[0]["inputs"] == [[whole]]  # the tokenizer adds [CLS] itself
    assert seen[1]["input"] == [tokenizer.bos_token + whole]
    assert seen[1]["add_special_tokens"] is False


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BackboneError):
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
    assert set(threading.enumerate()) <= before
