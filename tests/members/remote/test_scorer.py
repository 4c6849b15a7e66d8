"""A remote member keeps the scorer's law: samples in, raw scores out, each in its place or NaN."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ensemble_rm import FunctionScorer, RewardEnsemble, Scorer
from ensemble_rm.aggregation import make_aggregator
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import (
    NonFiniteScoreError,
    RemoteFailureWarning,
    RemoteRefusalError,
    RemoteUnavailableError,
)
from ensemble_rm.members import ClientOptions, RemoteScorer
from tests.support import wire_doubles as doubles
from tests.support.remote_members import QUICK, member, openrlhf, samples


def test_it_is_a_scorer_that_can_be_stored() -> None:
    assert isinstance(member(), Scorer) and member().kind == "remote"


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
    found = scorer.score_detailed(samples(20))
    scorer.close()
    assert {i for i in range(20) if math.isnan(found.scores[i, 0])} == bad
    assert set(found.errors) == bad
    assert all("422" in str(error) for error in found.errors.values())


@pytest.mark.parametrize("status", [500, 422])
@given(bad=st.sets(st.integers(0, 63)), size=st.sampled_from([8, 16]))
@settings(max_examples=15, deadline=None)
def test_culprits_of_batches_side_by_side_take_nobody_with_them(
    status: int, bad: set[int], size: int
) -> None:
    """Nor where the server calls them errors of its own, first of each batch or many in a row."""

    async def handle(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        queries = json.loads(request.content)["query"]
        if any(int(query) in bad or int(query) % size == 0 for query in queries):
            return httpx.Response(status, text="cannot take this")
        return httpx.Response(200, json={"rewards": [float(query) for query in queries]})

    options = ClientOptions(backoff=1e-5, open_after=2, reset_after=1000, deadline=100)
    scorer = member(httpx.MockTransport(handle), batch_size=size, client=options)
    found = scorer.score_detailed(samples(64))
    scorer.close()
    assert set(found.errors) == bad | set(range(0, 64, size))


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

    return member(httpx.MockTransport(handle), client=QUICK, **options)


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


def test_of_no_sample_nobody_is_asked() -> None:
    """Nor probed: a server that is away fails nothing that it was not needed for."""
    away = unreachable(raw_logit_check="error")
    assert away.score([]).shape == (0, 1) and not away.score_detailed([]).errors
    assert ensemble(unreachable(raw_logit_check="warn")).score([]).reward.shape == (0,)
    with pytest.raises(RemoteUnavailableError):
        away.score(samples(1))  # the probes are still to come


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
            url, protocol="openrlhf", name="far", template="plain", raw_logit_check="off"
        )
        first = scorer.score(samples(3))
        scorer.close()
        assert scorer.score(samples(3)).tolist() == first.tolist()
