"""Routing: who is asked about what, what is saved, and what the answers are worth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ensemble_rm import FunctionScorer, Preference, Preferences, RewardEnsemble
from ensemble_rm.active_learning import (
    Routed,
    choose_threshold,
    pair_uncertainty,
    route,
    threshold_for_share,
    to_tasks,
)
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import (
    DataError,
    NotCalibratedError,
    OneMemberError,
    OptionError,
)
from ensemble_rm.members import ClientOptions, JudgeComparator, Price
from ensemble_rm.metrics import nll
from tests.support.judge_doubles import judge, quality

N = 400


@cache
def noise(text: str, member: int) -> float:
    rng = np.random.default_rng([member, *text.encode()])
    # Long texts are what the members do not know.
    return float(rng.normal(0, 3.0 if text.startswith("hard") else 0.1))


def member(i: int) -> FunctionScorer:
    return FunctionScorer(f"m{i}", lambda s: quality(s.completion) + noise(s.completion, i))


def make_pairs(n: int, *, seed: int) -> Preferences:
    """Pairs whose verdicts are drawn from the judge's own mind; every second is hard."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        kind = "hard" if i % 2 else "easy"
        a, b = f"{kind} {seed} {i} a", f"{kind} {seed} {i} b"
        p = 1 / (1 + math.exp(-3 * (quality(a) - quality(b))))
        verdict = Preference(f"q{seed} {i}", a, b, id=f"{seed}-{i}")
        rows.append(verdict if rng.random() < p else replace(verdict, votes=(0.0, 1.0)))
    return Preferences(tuple(rows))


@pytest.fixture(scope="module")
def ensemble() -> RewardEnsemble:
    members = tuple(member(i) for i in range(4))
    plain = RewardEnsemble(members, Normaliser.identity(4), mean())
    return plain.calibrate(make_pairs(N, seed=1))


@pytest.fixture(scope="module")
def pairs() -> Preferences:
    return make_pairs(N, seed=2)


def asked(**options: Any) -> JudgeComparator:
    return JudgeComparator(
        "http://judge.test/v1", model="judge", transport=judge(**options), price=Price(1.0, 1.0)
    )


def go(ensemble: RewardEnsemble, pairs: Preferences, **options: Any) -> Routed:
    options = {"judge": asked(), "share": 0.5} | options
    return route(ensemble, pairs, **options)


def test_the_uncertain_are_judged_and_no_others(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    found = go(ensemble, pairs)
    judged = np.array([whose == "judge" for whose in found.routes])
    assert judged.sum() == N // 2
    assert found.uncertainty[judged].min() >= found.threshold > found.uncertainty[~judged].max()
    assert (found.probability[~judged] == found.comparison.probability[~judged]).all()
    assert (found.probability[judged] == found.judge_probability[judged]).all()
    truth = [quality(p.chosen) - quality(p.rejected) for p in pairs]
    np.testing.assert_allclose(
        found.probability[judged], 1 / (1 + np.exp(-np.array(truth)[judged]))
    )
    hard = np.array([p.chosen.startswith("hard") for p in pairs])
    assert hard[judged].mean() > 0.8  # what the members do not know


def test_half_the_calls_bring_most_of_the_judge(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    """Planted: the judge knows; routing by uncertainty gains more than routing at random."""
    none = go(ensemble, pairs, share=0.0)
    half, all_ = go(ensemble, pairs), go(ensemble, pairs, share=1.0)
    targets = pairs.targets

    def loss(p: np.ndarray[Any, Any]) -> float:
        return float(nll(np.clip(p, 1e-6, 1 - 1e-6), targets))

    ours, best, theirs = loss(none.probability), loss(all_.probability), loss(half.probability)
    assert best < theirs < ours
    rng = np.random.default_rng(0)
    at_random = []
    for _ in range(200):
        mask = rng.permutation(N) < N // 2
        at_random.append(loss(np.where(mask, all_.probability, none.probability)))
    assert theirs < min(at_random)


def test_what_is_saved_is_what_was_not_asked(ensemble: RewardEnsemble, pairs: Preferences) -> None:
    seen: list[dict[str, Any]] = []
    found = go(ensemble, pairs, judge=asked(seen=seen), share=0.25)
    saving = found.saving
    assert len(seen) == 2 * saving.judged == 2 * (N // 4)
    assert saving.share == 0.25
    assert saving.without is not None
    assert saving.without.calls == 2 * N
    assert saving.without.prompt_tokens == 4 * saving.usage.prompt_tokens
    assert saving.without.cost == pytest.approx(4 * (saving.usage.cost or math.nan))
    assert json.loads(json.dumps(saving.to_json()))["judged"] == N // 4
    nothing = go(ensemble, pairs, share=0.0).saving
    assert nothing.judged == 0 and nothing.without is None and nothing.usage.calls == 0


def test_an_outage_in_mid_run_leaves_the_price_of_all_pairs(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    """What was never asked costs nothing, and would have cost what the others did."""
    inner, left = judge(), 40

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal left
        left -= 1
        if left < 0:
            raise httpx.ConnectError("refused")
        return inner.handler(request)  # type: ignore[return-value]

    quick = ClientOptions(deadline=1.0, backoff=0.01, reset_after=0.01, concurrency=1)
    far = JudgeComparator(
        "http://judge.test/v1",
        model="judge",
        transport=httpx.MockTransport(handle),
        price=Price(1.0, 1.0),
        client=quick,
    )
    saving = go(ensemble, pairs, judge=far).saving
    assert (saving.usage.calls, saving.usage.failed) == (40, 0)
    assert saving.usage.unreached == N - 40
    assert saving.without is not None and saving.without.calls == 2 * N
    assert saving.without.prompt_tokens == 2 * N * 100


def test_swapped_pairs_are_routed_alike(ensemble: RewardEnsemble, pairs: Preferences) -> None:
    swapped = Preferences(tuple(replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs))
    there = go(ensemble, pairs, judge=asked(bias=1.0))
    back = go(ensemble, swapped, judge=asked(bias=1.0))
    assert there.routes == back.routes
    np.testing.assert_allclose(there.probability + back.probability, 1.0, atol=1e-9)


def test_a_budget_takes_the_most_uncertain_and_leaves_the_rest_to_humans(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    found = go(ensemble, pairs, budget=30, audit_share=0.0)
    judged = np.array([whose == "judge" for whose in found.routes])
    assert judged.sum() == 30
    unsure = found.uncertainty >= found.threshold
    assert found.uncertainty[judged].min() >= found.uncertainty[unsure & ~judged].max()
    assert {p.external_id for p in found.pool.pairs} == {
        pairs[int(i)].id for i in np.flatnonzero(unsure & ~judged)
    }
    assert {p.inclusion for p in found.pool.pairs} == {1.0}


def test_a_judgment_that_fails_leaves_the_ensembles_and_goes_to_humans(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    bad = next(p for p in pairs if p.chosen.startswith("hard"))
    spoiled = asked(spoil=lambda texts: bad.chosen in texts.values())
    found = go(ensemble, pairs, judge=spoiled, share=1.0, audit_share=0.0)
    (row,) = [i for i, p in enumerate(pairs) if p is bad]
    assert found.routes[row] == "ensemble" and found.failures[row]
    assert found.probability[row] == found.comparison.probability[row]
    assert [p.external_id for p in found.pool.pairs] == [bad.id]
    assert found.saving.usage.failed == 2


def test_without_a_judge_all_go_to_humans(ensemble: RewardEnsemble, pairs: Preferences) -> None:
    found = go(ensemble, pairs, judge=None, audit_share=0.0)
    assert (found.probability == found.comparison.probability).all()
    assert len(found.pool) == N // 2
    rows = to_tasks(found.pool, "jsonl", batch="b")
    assert {row["strategy"] for row in rows} == {"route-epistemic"}
    assert len({pair.external_id for pair in found.pool.pairs}) == len(rows) == N // 2
    swapped = sum(row["first"].endswith("b") for row in rows)
    assert 0.3 < swapped / len(rows) < 0.7


def test_the_audit_makes_the_pool_speak_for_all(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    """Weights 1/π estimate the number of all pairs, and of all hard ones, without bias."""
    counts, hard = [], []
    for seed in range(80):
        pool = go(ensemble, pairs, judge=None, share=0.2, audit_share=0.3, seed=seed).pool
        weights = np.array([1 / p.inclusion for p in pool.pairs])
        counts.append(weights.sum())
        hard.append(weights[[p.first.startswith("hard") for p in pool.pairs]].sum())
        assert pool.floor == 0.3 and {p.inclusion for p in pool.pairs} == {0.3, 1.0}
    for found, true in ((counts, N), (hard, N / 2)):
        error = np.std(found) / math.sqrt(len(found))
        assert abs(np.mean(found) - true) < 4 * error


def test_different_pairs_of_one_id_are_refused_before_anybody_is_asked(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    """One of them would vanish from the pool; `select_pairs` refuses them alike."""
    seen: list[dict[str, Any]] = []
    double = Preferences((pairs[0], replace(pairs[1], id=pairs[0].id)))
    with pytest.raises(DataError, match=repr(pairs[0].id)):
        go(ensemble, double, judge=asked(seen=seen), share=1.0)
    assert not seen
    same = Preferences((pairs[0], pairs[0].swap()))  # one pair in two rows
    assert len(go(ensemble, same, judge=None, share=1.0).pool) == 1


@pytest.mark.parametrize("ids", [True, False])
def test_a_pair_in_many_rows_is_drawn_once(
    ids: bool, ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    """Its π is the share of seeds in which it is in the pool, whatever became of its rows."""
    rows = [pair if ids else replace(pair, id=None) for pair in pairs[:40] for _ in range(4)]
    judged, seeds = 0, 50
    for seed in range(seeds):
        pool = go(ensemble, Preferences(tuple(rows)), share=1.0, audit_share=0.3, seed=seed).pool
        assert {pair.inclusion for pair in pool.pairs} <= {0.3}
        assert (pool.pool, pool.repeated) == (40, 120)
        judged += len(pool)
    n = 40 * seeds
    assert abs(judged / n - 0.3) < 4 * math.sqrt(0.3 * 0.7 / n)
    # One row is left over by the budget: it waits, and so does the pair, for certain.
    for seed in range(5):
        one = Preferences(tuple(rows[:4]))
        pool = go(ensemble, one, share=1.0, budget=3, audit_share=0.3, seed=seed).pool
        assert [pair.inclusion for pair in pool.pairs] == [1.0]


def test_a_pool_of_two_opinions_lies_between_them(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    found = go(ensemble, pairs, final="pooled")
    both = np.stack([found.comparison.probability, found.judge_probability])
    judged = np.isfinite(found.judge_probability)
    assert (found.probability[judged] >= both[:, judged].min(axis=0) - 1e-9).all()
    assert (found.probability[judged] <= both[:, judged].max(axis=0) + 1e-9).all()


def test_another_ensemble_can_be_the_judge(ensemble: RewardEnsemble, pairs: Preferences) -> None:
    found = go(ensemble, pairs, judge=ensemble)
    np.testing.assert_allclose(found.probability, found.comparison.probability)
    assert found.saving.usage.calls == N // 2


def test_one_member_has_only_its_predictive_entropy(pairs: Preferences) -> None:
    one = RewardEnsemble((member(0),), Normaliser.identity(1), mean())
    with pytest.raises(NotCalibratedError):
        go(one, pairs)
    one = one.calibrate(make_pairs(N, seed=3))
    with pytest.raises(OneMemberError):
        go(one, pairs)
    found = go(one, pairs, uncertainty="predictive")
    p = found.comparison.probability
    np.testing.assert_allclose(found.uncertainty, -p * np.log(p) - (1 - p) * np.log1p(-p))
    judged = [whose == "judge" for whose in found.routes]
    assert np.abs(p - 0.5)[judged].max() <= np.abs(p - 0.5)[~np.array(judged)].min()


@pytest.mark.parametrize("uncertainty", ["epistemic", "total", "aleatoric"])
def test_uncertainties_are_those_of_the_comparison(
    uncertainty: str, ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    found = go(ensemble, pairs, uncertainty=uncertainty)
    assert (found.uncertainty == getattr(found.comparison, uncertainty)).all()
    assert (pair_uncertainty(found.comparison, uncertainty) == found.uncertainty).all()


@given(
    values=st.lists(st.floats(0, 1) | st.sampled_from([0.25, 0.5]), min_size=1, max_size=40),
    share=st.floats(0, 1),
)
def test_a_threshold_keeps_its_share_and_no_larger_set_does(
    values: list[float], share: float
) -> None:
    u = np.array(values)
    threshold = threshold_for_share(u, share)
    passed = u >= threshold
    assert passed.sum() <= share * len(u) + 1e-6
    if not passed.all():
        more = u >= u[~passed].max()
        assert more.sum() > share * len(u) - 1e-6


def test_a_threshold_chosen_on_other_pairs_keeps_the_budget_nearly(
    ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    threshold = choose_threshold(ensemble, make_pairs(N, seed=5), share=0.3)
    found = go(ensemble, pairs, share=None, threshold=threshold)
    assert abs(found.saving.share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / N * 2)


@given(share=st.floats(0, 1), budget=st.none() | st.integers(0, 30))
@settings(max_examples=15, deadline=None)
def test_every_pair_has_one_answer(share: float, budget: int | None) -> None:
    members = tuple(member(i) for i in range(3))
    plain = RewardEnsemble(members, Normaliser.identity(3), mean())
    found = go(
        plain.calibrate(make_pairs(60, seed=7), min_judgments=10),
        make_pairs(20, seed=8),
        share=share,
        budget=budget,
    )
    assert np.isfinite(found.probability).all() and len(found.routes) == 20
    assert found.saving.judged <= min(20 * share + 1e-6, 20 if budget is None else budget)


@pytest.mark.parametrize(
    "options",
    [
        *({"threshold": 0.1}, {"share": None}, {"share": 1.5}, {"share": None, "threshold": -1.0}),
        *({"share": None, "threshold": math.nan}, {"budget": -1}, {"final": "mean"}),
        *({"audit_share": 2.0}, {"uncertainty": "std"}),
    ],
)
def test_options_that_cannot_be_used(
    options: dict[str, Any], ensemble: RewardEnsemble, pairs: Preferences
) -> None:
    with pytest.raises(OptionError):
        go(ensemble, pairs, **options)


def test_no_pair_is_an_error(ensemble: RewardEnsemble) -> None:
    with pytest.raises(DataError):
        go(ensemble, Preferences(()))
    with pytest.raises(DataError):
        threshold_for_share([], 0.5)
