"""Shifts without labels: false alarms under clusters, power by kind, storage, the feature space."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import beta as beta_distribution, ks_2samp
from sklearn.covariance import LedoitWolf

from ensemble_rm import Scores
from ensemble_rm.drift import Reference, unlabelled_drift
from ensemble_rm.drift.multiplicity import holm, permutation_p
from ensemble_rm.drift.unlabelled import UnlabelledDrift
from ensemble_rm.errors import (
    DataError,
    NonFiniteScoreError,
    OptionError,
    StorageError,
)
from ensemble_rm.members.scorer import Truncation
from ensemble_rm.uncertainty import fit_feature_space
from ensemble_rm.uncertainty.distance import FeatureSpace


def scores_of(members: np.ndarray, names: tuple[str, ...] = ()) -> Scores:
    k = members.shape[1]
    names = names or tuple(f"m{i}" for i in range(k))
    return Scores(names, members, members, members.mean(axis=1), Truncation.none(len(members)))


def batch(
    rng: np.random.Generator,
    prompts: int,
    *,
    each: int = 4,
    k: int = 3,
    shift: float = 0.0,
    own: float = 0.7,
    cluster: float = 1.0,
) -> tuple[Scores, np.ndarray]:
    """Scores with a common part, a part of each member, and an offset of each prompt."""
    groups = np.repeat(np.arange(prompts), each)
    n = len(groups)
    common = rng.normal(0, 1, (n, 1)) + cluster * rng.normal(0, 1, (prompts, 1))[groups]
    spread = own * (rng.normal(0, 1, (n, k)) + cluster * rng.normal(0, 1, (prompts, k))[groups])
    return scores_of(shift + common + spread), groups


def drift_of(seed: int, *, prompts: int = 60, **changes: Any) -> UnlabelledDrift:
    rng = np.random.default_rng(seed)
    reference = Reference.of(*batch(rng, 80))
    return unlabelled_drift(reference, *batch(rng, prompts, **changes), seed=seed)


@pytest.mark.slow
def test_false_alarms_keep_their_share_under_clusters() -> None:
    """300 checks without drift; a test that takes samples for independent would alarm in most."""
    alarms, naive = 0, 0
    for seed in range(300):
        alarms += drift_of(seed).alarm
        rng = np.random.default_rng(seed)
        then, now = batch(rng, 80, each=8, cluster=2.0)[0], batch(rng, 60, each=8, cluster=2.0)[0]
        naive += ks_2samp(then.reward, now.reward).pvalue <= 0.05
    # The upper bound of 99.9 % on a share of .05 in 300 draws, and at least some were raised.
    assert 0 < alarms <= beta_distribution.ppf(0.999, 300 * 0.05 + 1, 300 * 0.95) * 300
    assert naive > 60


@pytest.mark.slow
def test_p_values_are_uniform_where_nothing_shifts() -> None:
    p = np.array([[shift.p for shift in drift_of(seed).shifts] for seed in range(200)])
    for column in p.T:
        assert abs((column <= 0.2).mean() - 0.2) < 0.1
        assert abs(column.mean() - 0.5) < 0.08


@pytest.mark.parametrize(
    ("changes", "name", "sign"),
    [
        ({"shift": 1.5}, "reward", 1),
        ({"shift": -1.5}, "reward", -1),
        ({"own": 1.6}, "std", 1),
        ({"own": 0.3}, "std", -1),
        ({"own": 2.0}, "correlation", -1),
        ({"own": 0.2}, "correlation", 1),
    ],
)
def test_each_shift_is_found_under_its_name(
    changes: dict[str, float], name: str, sign: int
) -> None:
    found = drift_of(3, prompts=100, **changes)
    by_name = {shift.name: shift for shift in found.shifts}
    assert by_name[name].alarm
    assert np.sign(by_name[name].effect) == sign
    if name == "reward":
        assert not by_name["std"].alarm
        assert not by_name["correlation"].alarm
    else:
        assert not by_name["reward"].alarm


def test_the_statistic_is_scipys_where_each_prompt_has_one_sample() -> None:
    rng = np.random.default_rng(0)
    (then, a), (now, b) = batch(rng, 80, each=1), batch(rng, 60, each=1, shift=0.4)
    reward = unlabelled_drift(Reference.of(then, a), now, b).shifts[0]
    known = ks_2samp(then.reward, now.reward)
    assert reward.statistic == pytest.approx(known.statistic)
    assert reward.p == pytest.approx(known.pvalue, abs=0.05)


def test_a_prompt_that_is_sampled_more_often_weighs_no_more() -> None:
    """Eight completions a prompt now against two then: the thinner side sets how many are used."""
    alarms = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        reference = Reference.of(*batch(rng, 80, each=2, cluster=2.0))
        now = batch(rng, 60, each=8, cluster=2.0)
        alarms += unlabelled_drift(reference, *now, alpha=0.2, seed=seed).alarm
    assert alarms <= 21  # P ≤ .002 at a share of .2


def test_checks_share_one_alpha() -> None:
    rng = np.random.default_rng(1)
    reference, now = Reference.of(*batch(rng, 80)), batch(rng, 60, shift=1.0)
    once, often = (unlabelled_drift(reference, *now, checks=checks) for checks in (1, 24))
    assert often.permutations > once.permutations
    for shift in often.shifts:
        assert shift.alarm == (shift.adjusted <= 0.05 / 24)


def test_one_member_has_neither_spread_nor_correlation() -> None:
    rng = np.random.default_rng(0)
    found = unlabelled_drift(Reference.of(*batch(rng, 80, k=1)), *batch(rng, 60, k=1))
    assert [shift.name for shift in found.shifts] == ["reward"]
    assert set(found.unavailable) == {"std", "correlation", "distance"}
    assert "Scorer.features" in found.unavailable["distance"]


def test_a_member_that_never_varies_has_no_correlation() -> None:
    rng = np.random.default_rng(0)
    (then, a), (now, b) = batch(rng, 80), batch(rng, 60)
    then.members[:, 0] = 1.0
    found = unlabelled_drift(Reference.of(then, a), now, b)
    assert "do not vary" in found.unavailable["correlation"]


def test_features_far_from_training_are_found() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(0, 1, (20, 20))
    space = fit_feature_space(rng.normal(0, 1, (400, 20)) @ mix)
    then, a = batch(rng, 80)
    reference = Reference.of(then, a, space=space, features=rng.normal(0, 1, (len(a), 20)) @ mix)
    now, b = batch(rng, 60)
    near = unlabelled_drift(reference, now, b, features=rng.normal(0, 1, (len(b), 20)) @ mix)
    far = unlabelled_drift(reference, now, b, features=rng.normal(0, 1.5, (len(b), 20)) @ mix)
    assert not near.alarm
    assert [shift.name for shift in far.shifts if shift.alarm] == ["distance"]
    without = unlabelled_drift(reference, now, b)
    assert without.unavailable == {"distance": "the batch came without features"}


def test_a_reference_is_read_back_as_it_was(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores, prompts = batch(rng, 80)
    features = rng.normal(0, 1, (len(prompts), 6))
    space = fit_feature_space(features)
    kept = Reference.of(scores, prompts, space=space, features=features)
    read = Reference.load(kept.save(tmp_path / "reference"))
    now, more = batch(rng, 60), rng.normal(0, 1, (240, 6))
    one, two = (unlabelled_drift(r, *now, features=more) for r in (kept, read))
    assert one == two
    assert UnlabelledDrift.from_json(json.loads(json.dumps(one.to_json()))) == one
    plain = Reference.of(scores, prompts)
    assert Reference.load(plain.save(tmp_path / "plain")).space is None
    (tmp_path / "plain" / "reference.safetensors").write_bytes(b"half")
    with pytest.raises(StorageError, match="contains no reference"):
        Reference.load(tmp_path / "plain")
    with pytest.raises(StorageError):
        Reference.load(tmp_path)


def test_a_large_reference_is_thinned_by_prompt() -> None:
    scores, prompts = batch(np.random.default_rng(0), 1200, each=10, k=2)
    kept = Reference.of(scores, prompts).samples
    assert kept.prompts == 1000
    assert (np.bincount(kept.groups) == 8).all()


def test_refusals() -> None:
    rng = np.random.default_rng(0)
    scores, prompts = batch(rng, 40)
    reference = Reference.of(scores, prompts)
    with pytest.raises(DataError, match="19 prompts"):
        Reference.of(*batch(rng, 19))
    with pytest.raises(OptionError, match="or neither"):
        Reference.of(scores, prompts, features=np.zeros((len(prompts), 2)))
    with pytest.raises(OptionError, match="40 prompts"):
        unlabelled_drift(reference, scores, prompts[::4])
    with pytest.raises(OptionError, match="other"):
        unlabelled_drift(reference, scores_of(scores.members, ("a", "b", "other")), prompts)
    with pytest.raises(OptionError, match="checks"):
        unlabelled_drift(reference, scores, prompts, checks=0)
    broken = scores_of(np.where(np.arange(len(prompts))[:, None] == 3, np.nan, scores.members))
    with pytest.raises(NonFiniteScoreError):
        unlabelled_drift(reference, broken, prompts)


# The feature space ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(300, 10), (60, 100)])
def test_distances_are_those_of_ledoit_and_wolf(n: int, d: int) -> None:
    """Exact where every direction is kept, with fewer samples than features, too."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (n, d)) @ rng.normal(0, 1, (d, d)) + 3.0
    space = fit_feature_space(x)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    known = LedoitWolf(assume_centered=True).fit(z).mahalanobis(z)
    assert space.distance(x) ** 2 * d == pytest.approx(known, rel=1e-6)


@given(arrays(np.float64, 8, elements=st.floats(0.01, 100)), st.integers(0, 99))
def test_units_of_features_change_nothing(scale: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0, 1, (60, 8)), rng.normal(0, 2, (5, 8))
    moved = fit_feature_space(x * scale + 7).distance(y * scale + 7)
    assert moved == pytest.approx(fit_feature_space(x).distance(y), rel=1e-6)


def test_few_directions_still_tell_far_from_near() -> None:
    rng = np.random.default_rng(0)
    x = (
        rng.normal(0, 1, (500, 40))
        * np.geomspace(5, 0.5, 40)
        @ np.linalg.qr(rng.normal(0, 1, (40, 40)))[0]
    )
    space = fit_feature_space(x, directions=5)
    assert space.directions.shape == (5, 40)
    assert np.mean(space.distance(x) ** 2) == pytest.approx(1.0, rel=0.15)
    assert space.distance(3 * x).mean() > 2 * space.distance(x).mean()
    read = FeatureSpace.from_arrays(space.arrays())
    assert (read.distance(x) == space.distance(x)).all()


def test_a_feature_that_never_varies_is_harmless() -> None:
    x = np.random.default_rng(0).normal(0, 1, (80, 3))
    x[:, 1] = 5.0
    assert np.isfinite(fit_feature_space(x).distance(x)).all()


def test_a_space_refuses_what_it_cannot_use() -> None:
    x = np.random.default_rng(0).normal(0, 1, (80, 3))
    with pytest.raises(DataError, match="49"):
        fit_feature_space(x[:49])
    with pytest.raises(NonFiniteScoreError):
        fit_feature_space(np.where(x > 2, np.inf, x))
    with pytest.raises(OptionError, match="2 features"):
        fit_feature_space(x).distance(x[:, :2])
    with pytest.raises(OptionError):
        fit_feature_space(x[0])


# Multiplicity --------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0001, 1.0), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_step_by_step(p: list[float], alpha: float) -> None:
    adjusted = holm(p)
    rejected: set[int] = set()
    for step, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] * (len(p) - step) > alpha:
            break
        rejected.add(int(i))
    assert {i for i, a in enumerate(adjusted) if a <= alpha} == rejected
    assert (adjusted >= np.array(p) - 1e-15).all()


def test_a_permutation_p_is_never_zero() -> None:
    assert permutation_p(5.0, np.zeros(99)) == 0.01
    assert permutation_p(0.0, np.zeros(99)) == 1.0
