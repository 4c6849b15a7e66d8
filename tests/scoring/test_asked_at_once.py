"""Members on other servers are asked at once, while the others compute, and given up together."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from ensemble_rm import FunctionScorer, RewardEnsemble, Sample
from ensemble_rm.aggregation import make_aggregator
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import RemoteFailureWarning, RemoteRefusalError, RemoteUnavailableError
from ensemble_rm.members import ClientOptions, JudgeScorer
from ensemble_rm.members.scorer import Scorer
from ensemble_rm.uncertainty.distance import fit_feature_space
from tests.support.judge_doubles import completion
from tests.support.remote_members import QUICK, member, openrlhf, samples

PATIENT = ClientOptions(deadline=120)
SECONDS = 60  # a wait that would be a failure


def ensemble(scorers: Sequence[Scorer], **options: Any) -> RewardEnsemble:
    aggregator = make_aggregator("mean", nan="omit")
    k = len(scorers)
    return RewardEnsemble(tuple(scorers), Normaliser.identity(k), aggregator, **options)


class Seeing(Scorer):
    """A member that shows what it reads."""

    names = ("seeing",)

    def __init__(self, before: Callable[[], object]) -> None:
        self.before = before

    def score(self, read: Sequence[Sample]) -> NDArray[np.float64]:
        self.before()
        return np.array([[len(sample.completion)] for sample in read], dtype=np.float64)

    def features(self, read: Sequence[Sample]) -> NDArray[np.float64]:
        found = [
            (len(s.completion), s.completion.count("1"), s.completion.count("2")) for s in read
        ]
        return np.array(found, dtype=np.float64)


def meeting(barrier: threading.Barrier) -> list[Scorer]:
    """Two remote members, a judge and a local one; none has a score before all are asked."""

    def score(text: str) -> float:
        barrier.wait(SECONDS)
        return float(text)

    def judged(_: httpx.Request) -> httpx.Response:
        barrier.wait(SECONDS)
        return httpx.Response(200, json=completion("7", None))

    return [
        member(openrlhf(score), name="one", client=PATIENT),
        Seeing(lambda: barrier.wait(SECONDS)),
        JudgeScorer(
            "http://judge.test/v1",
            model="judge",
            name="judge",
            transport=httpx.MockTransport(judged),
            client=PATIENT,
        ),
        member(openrlhf(lambda text: -score(text)), name="two", client=PATIENT),
    ]


def test_all_are_asked_before_any_has_answered() -> None:
    found = ensemble(meeting(threading.Barrier(4))).score([Sample("", "12")])
    assert found.raw.tolist() == [[12.0, 2.0, 7.0, -12.0]]


def test_so_are_they_where_distances_are_taken_too() -> None:
    rng = np.random.default_rng(0)
    space = fit_feature_space(rng.normal(3, 1, (200, 3)))
    whole = ensemble(meeting(threading.Barrier(4)), feature_space=space)
    scores = whole.score([Sample("", "12")], distance=True)
    far = scores.distance
    assert scores.members.tolist() == [[12.0, 2.0, 7.0, -12.0]]
    assert far is not None and far == space.distance(np.array([[2.0, 1.0, 1.0]]))


@given(st.permutations(range(5)), st.integers(0, 4), st.integers(0, 9))
def test_columns_stand_in_the_order_of_the_members(order: list[int], here: int, n: int) -> None:
    def scorer(i: int) -> Scorer:
        if i < here:
            return FunctionScorer(f"m{i}", lambda sample: 10.0**i * float(sample.completion))
        return member(openrlhf(lambda text: 10.0**i * float(text)), name=f"m{i}")

    found = ensemble([scorer(i) for i in order]).score(samples(n))
    assert found.names == tuple(f"m{i}" for i in order)
    assert found.raw.tolist() == [[10.0**i * row for i in order] for row in range(n)]


class Waiting(httpx.AsyncBaseTransport):
    """A server that never answers, and knows when it was asked and given up."""

    def __init__(self) -> None:
        self.asked, self.given_up = threading.Event(), threading.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.set()
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:
            self.given_up.set()
            raise
        raise AssertionError(f"{request.url} was waited for")


def test_a_member_that_fails_gives_up_what_the_others_were_asked() -> None:
    far = Waiting()

    def bad(_: Sample) -> float:
        assert far.asked.wait(SECONDS)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ensemble([member(far, client=PATIENT), FunctionScorer("bad", bad)]).score(samples(2))
    assert far.given_up.wait(SECONDS)


def test_a_refusal_is_raised_without_waiting_for_the_others() -> None:
    far = Waiting()

    def refuse(_: str) -> float:
        assert far.asked.wait(SECONDS)
        return 1.0

    refusing = member(openrlhf(refuse, status=401), name="closed", client=PATIENT)
    with pytest.raises(RemoteRefusalError):
        ensemble([refusing, member(far, client=PATIENT)]).score(samples(1))
    assert far.given_up.wait(SECONDS)


def test_one_that_cannot_even_be_asked_gives_up_the_others() -> None:
    far = Waiting()

    def template(_: Sample) -> str:
        assert far.asked.wait(SECONDS)
        raise ZeroDivisionError

    broken = member(openrlhf(float), name="broken", template=template)
    with pytest.raises(ZeroDivisionError):
        ensemble([member(far, client=PATIENT), broken]).score(samples(1))
    assert far.given_up.wait(SECONDS)


def probed(score: Callable[[str], float]) -> tuple[httpx.MockTransport, list[list[str]]]:
    """A server, and the texts of each request to it."""
    seen: list[list[str]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        texts = json.loads(request.content)["query"]
        seen.append(texts)
        return httpx.Response(200, json={"rewards": [score(text) for text in texts]})

    return httpx.MockTransport(handle), seen


def test_the_probes_go_before_the_first_samples_and_no_others() -> None:
    transport, seen = probed(lambda text: len(text) / 7 - 3)
    far = member(transport, raw_logit_check="error", client=PATIENT, batch_size=50)
    for _ in range(2):
        far.score(samples(3))
    probes, back, *rest = seen
    assert probes == back[::-1] and len(probes) > 3
    assert rest == [["0", "1", "2"]] * 2


@pytest.mark.parametrize("on_outage", ["nan", "raise"])
def test_who_does_not_answer_the_probes_is_asked_no_more(on_outage: str) -> None:
    """The samples would wait for the whole deadline again."""
    seen: list[list[str]] = []

    def away(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content)["query"])
        raise httpx.ConnectError("nobody", request=request)

    options = {"raw_logit_check": "warn", "on_outage": on_outage, "batch_size": 50}
    far = member(httpx.MockTransport(away), client=QUICK, **options)
    for _ in range(2):
        if on_outage == "raise":
            with pytest.raises(RemoteUnavailableError):
                far.score(samples(2))
        else:
            with pytest.warns(RemoteFailureWarning, match="2 of 2"):
                assert np.isnan(far.score(samples(2))).all()
    assert seen and all("boil" in texts[0] for texts in seen)


def test_scores_that_were_begun_can_be_given_up() -> None:
    far = Waiting()
    pending = member(far, client=PATIENT).begin(samples(1))
    assert far.asked.wait(SECONDS)
    pending.cancel()
    assert far.given_up.wait(SECONDS)


def test_a_member_lives_until_what_was_begun_is_read() -> None:
    pending = member(openrlhf(float), client=PATIENT).begin(samples(2))
    gc.collect()
    assert pending.result().scores.tolist() == [[0.0], [1.0]]


# Scored again in parts ---------------------------------------------------------------------------


def bad_at(*places: int) -> FunctionScorer:
    """A local member that fails at these samples."""

    def score(sample: Sample) -> float:
        if int(sample.completion) in places:
            raise ZeroDivisionError
        return 1.0

    return FunctionScorer("local", score)


@given(st.sets(st.integers(0, 11)), st.integers(1, 12), st.integers(1, 12))
def test_a_local_failure_asks_no_server_again(bad: set[int], n: int, distinct: int) -> None:
    """Whatever the others fail at, each sample is asked about once."""
    transport, seen = probed(float)
    whole = ensemble([member(transport), bad_at(*bad)])
    rows = [Sample("", str(i % distinct)) for i in range(n)]
    scores = whole.score(rows, on_error="record")
    for row, sample in enumerate(rows):
        value = int(sample.completion)
        if value in bad:
            assert isinstance(scores.failed[row], ZeroDivisionError)
            assert isinstance(scores.errors[row, "local"], ZeroDivisionError)
            assert np.isnan([*scores.raw[row], *scores.members[row], scores.reward[row]]).all()
        else:
            assert row not in scores.failed
            assert scores.raw[row].tolist() == [float(value), 1.0]
    asked = [text for texts in seen for text in texts]  # or given up before it was sent
    assert len(set(asked)) == len(asked)


def test_nor_does_an_error_of_a_server() -> None:
    asked = []

    def token() -> str:
        asked.append(1)
        raise ZeroDivisionError

    whole = ensemble([member(openrlhf(float), token=token), bad_at(3)])
    failed = whole.score(samples(8), on_error="record").failed
    assert [type(error) for error in failed.values()] == [ZeroDivisionError] * 8
    assert len(asked) == 1


@pytest.mark.parametrize("read", [True, False])
def test_what_was_given_up_was_paid_for(read: bool) -> None:
    """A judge's usage counts answers that nobody read, and a question that was under way."""
    asked = threading.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        if "endless" in json.loads(request.content)["messages"][-1]["content"]:
            asked.set()
            await asyncio.sleep(SECONDS)
        return httpx.Response(200, json=completion("7", None))

    judge = JudgeScorer(
        "http://judge.test/v1",
        model="judge",
        name="judge",
        transport=httpx.MockTransport(answer),
        client=ClientOptions(concurrency=1),
    )
    if read:
        judge.score([Sample("", "short")])
    pending = judge.begin([Sample("", text) for text in ("one", "endless", "three")])
    assert asked.wait(SECONDS)
    pending.cancel()
    judge.close()
    usage = judge.usage
    assert (usage.calls, usage.failed, usage.unreached) == (1 + read, 1, 1)
    assert usage.prompt_tokens == 100 * (1 + read)
    assert judge.with_token("another").usage == usage


def test_what_is_still_under_way_is_given_up_in_the_end() -> None:
    far = Waiting()

    def bad(_: Sample) -> float:
        assert far.asked.wait(SECONDS)
        raise ZeroDivisionError

    whole = ensemble([member(far, client=PATIENT), FunctionScorer("bad", bad)])
    failed = whole.score(samples(3), on_error="record").failed
    assert sorted(failed) == [0, 1, 2]
    assert far.given_up.wait(SECONDS)
