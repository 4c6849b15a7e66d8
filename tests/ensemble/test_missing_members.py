"""Members without a score: what an aggregator leaves out, everything that follows leaves out."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.special import entr, expit
from starlette.testclient import TestClient

from ensemble_rm import (
    FunctionScorer,
    Preference,
    Preferences,
    RewardEnsemble,
    Sample,
    combine,
    evaluate,
)
from ensemble_rm.active_learning import route
from ensemble_rm.active_learning.selection import select_pairs
from ensemble_rm.aggregation import make_aggregator, mean
from ensemble_rm.aggregation.aggregator import NanPolicy
from ensemble_rm.calibration import Normaliser
from ensemble_rm.calibration.methods.temperature import fit_mixture_temperature
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.errors import NonFiniteScoreError, OptionError
from ensemble_rm.evaluation.report import evaluation_text
from ensemble_rm.rl.monitor.alarms import AlarmRule
from ensemble_rm.rl.monitor.monitor import OverOptimisationMonitor
from ensemble_rm.rl.openrlhf import openrlhf_reward
from ensemble_rm.rl.scoring import LoopRewards
from ensemble_rm.server import create_app
from ensemble_rm.server.options import ServerOptions
from ensemble_rm.server.wire.raw_text import RawText
from ensemble_rm.uncertainty.disagreement import margin_correlation, member_std, split_uncertainty
from tests.support.server_runs import LOCAL

Floats = NDArray[np.float64]
NOW = datetime(2026, 7, 10, tzinfo=UTC)
OMIT = make_aggregator("mean", nan="omit")


@st.composite
def holed(draw: st.DrawFn) -> Floats:
    """A matrix of margins in which some are missing."""
    shape = (draw(st.integers(1, 8)), draw(st.integers(2, 5)))
    values = draw(arrays(np.float64, shape, elements=st.floats(-9, 9, width=32)))
    return np.where(draw(arrays(np.bool_, shape)), np.nan, values)


@given(holed(), st.floats(0.1, 5))
def test_uncertainty_is_that_of_the_members_that_scored(margins: Floats, t: float) -> None:
    found = split_uncertainty(margins, mixture_temperature=t, nan="omit")
    spread = member_std(margins, nan="omit")
    for i, row in enumerate(margins):
        there = row[~np.isnan(row)]
        if len(there) < 2:
            assert np.isnan([found.epistemic[i], found.total[i], spread[i]]).all()
            continue
        p = expit(there / t)
        entropy = entr(p) + entr(1 - p)
        total = entr(p.mean()) + entr(1 - p.mean())
        np.testing.assert_allclose(found.total[i], total, atol=1e-12)
        np.testing.assert_allclose(found.epistemic[i], total - entropy.mean(), atol=1e-12)
        np.testing.assert_allclose(spread[i], there.std(ddof=1), atol=1e-12)


@given(holed())
def test_two_members_are_correlated_over_what_both_scored(margins: Floats) -> None:
    k = margins.shape[1]
    wanted = np.ones((k, k))
    for i in range(k):
        for j in range(k):
            both = ~np.isnan(margins[:, i] + margins[:, j])
            x, y = margins[both, i], margins[both, j]
            norm = np.linalg.norm(x) * np.linalg.norm(y)
            assume(norm > 1e-3)
            wanted[i, j] = x @ y / norm
    np.testing.assert_allclose(margin_correlation(margins, nan="omit"), wanted, atol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_without_that_policy_a_hole_is_an_error(bad: float) -> None:
    margins = np.array([[1.0, bad], [0.0, 1.0]])
    with pytest.raises(NonFiniteScoreError):
        member_std(margins)
    with pytest.raises(NonFiniteScoreError):
        split_uncertainty(margins, mixture_temperature=1.0)
    with pytest.raises(NonFiniteScoreError):
        fit_normaliser(margins, [0, 0])
    if np.isinf(bad):
        with pytest.raises(NonFiniteScoreError):
            member_std(margins, nan="omit")
        with pytest.raises(NonFiniteScoreError):
            fit_mixture_temperature(margins, [1.0, 0.0])


def test_a_member_that_scored_nothing_and_pairs_that_nobody_scored_change_no_mixture() -> None:
    rng = np.random.default_rng(0)
    margins = rng.normal(size=(200, 3))
    y = (rng.random(200) < expit(margins.mean(axis=1))).astype(float)
    plain = fit_mixture_temperature(margins, y)
    beside = np.column_stack([margins, np.full(200, np.nan)])
    longer = np.concatenate([beside, np.full((5, 4), np.nan)])
    assert fit_mixture_temperature(beside, y) == pytest.approx(plain, rel=1e-9)
    assert fit_mixture_temperature(longer, [*y, 1, 0, 1, 0, 1]) == pytest.approx(plain, rel=1e-9)


def test_offset_and_scale_are_fitted_on_what_a_member_scored() -> None:
    rng = np.random.default_rng(1)
    scores, groups = rng.normal(size=(60, 3)), np.repeat(np.arange(20), 3)
    scores[rng.random(scores.shape) < 0.2] = np.nan
    found = fit_normaliser(scores, groups, nan="omit")
    for i, column in enumerate(scores.T):
        there = ~np.isnan(column)
        own = fit_normaliser(column[there, None], groups[there])
        assert (found.offset[i], found.scale[i]) == (own.offset[0], own.scale[0])
    scores[:, 1] = np.nan
    with pytest.raises(OptionError, match="member 1"):
        fit_normaliser(scores, groups, nan="omit")


# End to end --------------------------------------------------------------------------------------


def number(text: str) -> float:
    return (zlib.crc32(text.encode()) % 1000) / 250 - 2


def rejects(completion: str) -> bool:
    """What a server rejects for good, such as a text too long for it."""
    return zlib.crc32(b"far" + completion.encode()) % 20 == 0


def member(name: str) -> FunctionScorer:
    def score(sample: Sample) -> float:
        if name == "far" and rejects(sample.completion):
            return float("nan")
        own = zlib.crc32((name + sample.completion).encode()) % 100
        return number(sample.completion) + own / 100

    return FunctionScorer(name, score)


@pytest.fixture(scope="module")
def pairs() -> Preferences:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        sides = [f"answer {i} {w} {'x' * (i % 7)}" for w in ("a", "b")]
        won = rng.random() < expit(number(sides[0]) - number(sides[1]))
        rows.append(Preference(f"q{i}", *(sides if won else sides[::-1])))
    return Preferences(tuple(rows))


@pytest.fixture(scope="module")
def holed_pairs(pairs: Preferences) -> NDArray[np.bool_]:
    return np.array([rejects(p.chosen) or rejects(p.rejected) for p in pairs])


def test_one_rejected_sample_stops_no_combining_calibrating_or_evaluating(
    pairs: Preferences, holed_pairs: NDArray[np.bool_]
) -> None:
    names = ("near", "nearer", "far")
    made = combine({name: member(name) for name in names}, pairs, aggregator=OMIT)
    ensemble = made.calibrate(pairs)
    found = evaluate(ensemble, pairs, draws=20)
    assert 0 < holed_pairs.sum() < len(pairs)
    assert [found.row(name).missing for name in names] == [0, 0, holed_pairs.sum()]
    assert f"far scored {len(pairs) - holed_pairs.sum()} of the pairs" in evaluation_text(found)
    whole = pairs.take(np.flatnonzero(~holed_pairs))
    alone = evaluate(ensemble, whole, draws=20).row("far").after["nll"].estimate
    assert found.row("far").after["nll"].estimate == pytest.approx(alone, rel=1e-9)
    assert select_pairs(ensemble, pairs, strategy="bald", budget=20)
    with pytest.raises(NonFiniteScoreError, match="omit"):
        combine({name: member(name) for name in names}, pairs, aggregator=mean())


def test_rows_of_one_score_are_left_out_of_what_needs_two(pairs: Preferences) -> None:
    members = {name: member(name) for name in ("near", "far")}
    ensemble = combine(members, pairs, aggregator=OMIT).calibrate(pairs)
    found = evaluate(ensemble, pairs, draws=20)  # by lcb and uwo, too
    holes = sum(rejects(p.chosen) or rejects(p.rejected) for p in pairs)
    spread = [row for row in found.rows if row.name.startswith(("lcb", "uwo"))]
    assert [row.missing for row in spread] == [holes] * 2 and found.unrewarded == 0


def test_pairs_without_a_reward_are_counted_and_a_member_without_a_score_is_said(
    pairs: Preferences, holed_pairs: NDArray[np.bool_]
) -> None:
    strict = make_aggregator("mean", nan="omit", min_members=2)
    ensemble = RewardEnsemble((member("near"), member("far")), Normaliser.identity(2), strict)
    fitted = ensemble.calibrate(pairs)
    assert fitted.calibration is not None
    assert fitted.calibration.fit.judgments == (~holed_pairs).sum()
    found = evaluate(fitted, pairs, draws=20)
    assert (found.pairs, found.unrewarded) == ((~holed_pairs).sum(), holed_pairs.sum())
    assert f"{holed_pairs.sum()} further pairs have no reward" in evaluation_text(found)

    out = FunctionScorer("out", lambda _: float("nan"))
    beside = RewardEnsemble((member("near"), out), Normaliser.identity(2), OMIT)
    said = evaluate(beside.calibrate(pairs), pairs, draws=20)
    assert said.row("out").missing == len(pairs) and not said.row("out").before
    assert said.margin_correlation is None and said.pooling_gain is None
    assert "out scored no pair" in evaluation_text(said)
    with pytest.raises(NonFiniteScoreError, match="none of the 400 pairs"):
        evaluate(replace(beside, aggregator=strict), pairs)


@given(holed(), st.sampled_from(["mean", "minimum", "lcb"]), st.integers(1, 3))
def test_where_there_are_enough_scores_it_is_the_aggregators(
    scores: Floats, name: str, fewest: int
) -> None:
    assume(scores.shape[1] >= max(fewest, 2))
    options = {"kappa": 0.5} if name == "lcb" else {}
    how = make_aggregator(name, nan="omit", min_members=fewest, **options)
    found = how.where_enough(scores)
    for row, value in zip(scores, found, strict=True):
        if (~np.isnan(row)).sum() < max(fewest, 2 if name == "lcb" else 1):
            assert np.isnan(value)
        else:
            assert value == how(row[None])[0]


def test_a_judge_that_has_a_baseline_gets_the_references() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(200):
        sides = [f"answer {i} {w}" for w in ("a", "b")]
        won = rng.random() < expit(number(sides[0]) - number(sides[1]))
        rows.append(
            Preference(f"q{i}", *(sides if won else sides[::-1]), reference=f"reference {i}")
        )
    pairs = Preferences(tuple(rows))
    members = (member("near"), member("nearer"))
    small = RewardEnsemble(members, Normaliser.identity(2), mean()).calibrate(pairs)
    judge = combine({"a": member("near")}, pairs, baseline=True).calibrate(pairs)
    found = route(small, pairs, share=0.2, judge=judge)
    assert "judge" in found.routes and not any(found.failures)


def test_the_monitor_goes_on_while_a_member_is_out() -> None:
    members = tuple(member(name) for name in ("near", "nearer"))
    ensemble = RewardEnsemble((*members, FunctionScorer("c", len_of)), Normaliser.identity(3), OMIT)
    watch = OverOptimisationMonitor(ensemble, rule=AlarmRule(max_kl=5.0))
    samples = [Sample(f"q{i // 4}", "x" * (i + 1)) for i in range(16)]
    scores = ensemble.score(samples).members
    whole = LoopRewards(scores.mean(axis=1), scores, np.full(16, np.nan))
    assert not watch.observe(1, samples, whole, kl=1.0)
    out = scores.copy()
    out[:, 2] = np.nan
    holed_rewards = replace(whole, members=out, reward=np.nanmean(out, axis=1))
    assert [alarm.kind for alarm in watch.observe(2, samples, holed_rewards, kl=50.0)] == ["kl"]
    last = watch.records[-1]
    assert last.missing == pytest.approx(1 / 3) and np.isfinite(last.member_std)
    assert np.isnan(last.disagreement)
    np.testing.assert_allclose(last.member_std, member_std(out[:, :2]).mean())
    assert set(last.length_slopes) == {"reward", "mean", "minimum"}


def len_of(sample: Sample) -> float:
    return float(len(sample.completion))


def test_pairs_of_which_too_few_members_know_go_to_the_judge_first(
    pairs: Preferences, holed_pairs: NDArray[np.bool_]
) -> None:
    members = (member("near"), member("far"))
    ensemble = RewardEnsemble(members, Normaliser.identity(2), OMIT).calibrate(pairs)
    found = route(ensemble, pairs, share=float(holed_pairs.mean()), audit_share=0.0)
    np.testing.assert_allclose(found.uncertainty[holed_pairs], np.log(2))
    np.testing.assert_array_equal(found.uncertainty >= found.threshold, holed_pairs)
    assert len(found.pool) == holed_pairs.sum()
    assert np.isfinite(found.probability).all()


def test_the_server_says_null_where_nothing_is_known(
    pairs: Preferences, holed_pairs: NDArray[np.bool_]
) -> None:
    members = (member("near"), member("far"))
    ensemble = RewardEnsemble(members, Normaliser.identity(2), OMIT).calibrate(pairs)
    rows = [int(np.flatnonzero(holed_pairs)[0]), int(np.flatnonzero(~holed_pairs)[0])]
    asked = [
        {"prompt": p.prompt, "first": p.chosen, "second": p.rejected} for p in pairs.take(rows)
    ]
    with TestClient(create_app(lambda: ensemble), LOCAL) as client:
        said = client.post("/v1/compare", json={"pairs": asked}).json()
    for part in ("epistemic", "aleatoric"):
        assert said[part][0] is None and said[part][1] >= 0
    assert all(0 < p < 1 for p in said["probability"])


@pytest.mark.parametrize("nan", ["omit", "raise"])
@pytest.mark.parametrize("names", [("near",), ("near", "far")])
def test_a_trainers_logs_have_the_same_keys_for_every_sample(
    nan: NanPolicy, names: tuple[str, ...], pairs: Preferences, holed_pairs: NDArray[np.bool_]
) -> None:
    """In a trainer's process and on a server, asked for one sample at a time or for several."""
    members = tuple(member(name) for name in names)
    aggregator = make_aggregator("mean", nan=nan)
    ensemble = RewardEnsemble(members, Normaliser.identity(len(names)), aggregator)
    texts = [text for pair in pairs.take(range(40)) for text in (pair.chosen, pair.rejected)]
    texts = [text.strip() for text in texts]  # as wire formats do
    asked = []
    for text in texts:
        with suppress(NonFiniteScoreError):
            ensemble.score([Sample("q", text)])
            asked.append(text)
    assert (len(asked) < len(texts)) == (nan == "raise" and len(names) > 1)
    label = json.dumps([{"role": "user", "content": "q"}])
    inside = openrlhf_reward(ensemble, stop=["<|im_end|>"])
    options = ServerOptions(raw_text=RawText(stop=("<|im_end|>",)))
    keys = {"member_mean", "member_std"} if nan == "raise" and len(names) > 1 else {"member_mean"}
    with TestClient(create_app(lambda: ensemble, options), LOCAL) as client:
        for rows in [[text] for text in asked] + [asked]:
            body = {"query": rows, "prompts": [""] * len(rows), "labels": [label] * len(rows)}
            served = client.post("/get_reward", json=body).json()["extra_logs"]
            found = inside(*body.values())["extra_logs"]
            assert set(served) == set(found) == keys
            for key in keys:
                np.testing.assert_allclose(served[key], np.atleast_1d(found[key]))
                assert np.isfinite(served[key]).all()
