"""Linear heads at their optimum: an independent solver, planted heads, laws, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from ensemble_rm.errors import OptionError, TrainingError
from ensemble_rm.members import HeadRecipe
from ensemble_rm.members.heads.training import solve_heads
from ensemble_rm.members.heads.weights import HeadsResult, PairFeatures
from ensemble_rm.members.learning.seeds import member_seeds


def planted(n: int, seed: int, *, width: int = 12, views: int = 2) -> PairFeatures:
    """Verdicts of a linear utility of the first view's features, through σ."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 2, (2 * n, views, width)).astype(np.float32)
    w = np.random.default_rng(99).normal(size=width) * 0.4
    p = 1 / (1 + np.exp(-(x[:n, 0] - x[n:, 0]) @ w))
    y = (rng.random(n) < p).astype(float)
    return PairFeatures(x, y, np.ones(n), np.zeros(n), np.arange(n) // 2)


def solve(fit: PairFeatures, *, views: list[int] | None = None, **recipe: Any) -> HeadsResult:
    view_of = [0, 1] if views is None else views
    return solve_heads(
        fit,
        planted(200, 7, width=fit.features.shape[2]),
        view_of=view_of,
        recipe=HeadRecipe(**recipe),
        seeds=member_seeds(0, len(view_of)),
    )


@pytest.mark.parametrize(("n", "width"), [(300, 12), (20, 60)])
def test_it_is_scikit_learns_optimum(n: int, width: int) -> None:
    fit, tau = planted(n, 1, width=width), 0.93
    weights = solve(fit, views=[0], prior=(tau,)).weights
    sides = fit.features[:, 0].astype(float)
    z = (sides - weights.offset[0]) * weights.gain[0]
    d = z[:n] - z[n:]
    assert (d**2).sum(axis=1).mean() == pytest.approx(1)
    signs = np.where(np.arange(n) % 2, 1.0, -1.0)
    labels = np.where(fit.targets > 0.5, signs, -signs) > 0
    peer = LogisticRegression(C=tau**2, fit_intercept=False, tol=1e-10, max_iter=10000)
    peer.fit(d * signs[:, None], labels)
    np.testing.assert_allclose(d @ weights.weight[0], d @ peer.coef_[0], atol=1e-4)


def test_margins_soft_labels_weights_centring_and_smoothing_by_a_plain_minimiser() -> None:
    rng = np.random.default_rng(3)
    fit = planted(60, 1, width=5, views=1)
    fit = PairFeatures(
        fit.features, rng.random(60), rng.uniform(0.5, 2, 60), rng.normal(0, 0.5, 60), fit.groups
    )
    recipe = HeadRecipe(prior=(0.8,), smoothing=0.1, centring=0.05)
    held = planted(50, 2, width=5, views=1)
    seeds = member_seeds(0, 1)
    found = solve_heads(fit, held, view_of=[0], recipe=recipe, seeds=seeds).weights
    z = (fit.features[:, 0].astype(float) - found.offset[0]) * found.gain[0]
    y = 0.9 * fit.targets + 0.05
    c = fit.weights / fit.weights.mean()

    def objective(w: np.ndarray) -> float:
        chosen, rejected = z[:60] @ w, z[60:] @ w
        x = chosen - rejected - fit.margins
        loss = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
        loss = loss + 0.05 * (chosen + rejected) ** 2
        return float((c * loss).sum() + (w**2).sum() / (2 * 0.8**2))

    plain = minimize(objective, np.zeros(5), method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found.weight[0], plain.x, atol=1e-4)


def test_a_planted_utility_is_found_by_the_view_that_shows_it() -> None:
    result, test = solve(planted(800, 1)), planted(1000, 5)
    for member, low, high in ((0, 0.75, 1), (1, 0.4, 0.6)):
        scores = result.weights(member, test.features[:, member])
        share = ((scores[:1000] > scores[1000:]) == (test.targets > 0.5)).mean()
        assert low <= share <= high
    assert result.validation_nll[0] < 0.6 < result.validation_nll[1]


@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_the_unit_of_the_features_does_not_matter(scale: float, shift: float) -> None:
    fit = planted(80, 1, width=4)
    other = PairFeatures(
        (fit.features * scale + shift).astype(np.float32),
        fit.targets,
        fit.weights,
        fit.margins,
        fit.groups,
    )
    one, two = solve(fit, prior=(0.9,)).weights, solve(other, prior=(0.9,)).weights
    scores = [w(0, f.features[:, 0]) for w, f in ((one, fit), (two, other))]
    np.testing.assert_allclose(*scores, atol=1e-2 * scores[0].std())


def test_exchanging_sides_changes_nothing() -> None:
    fit = planted(100, 1)
    n = len(fit)
    turned = PairFeatures(
        np.concatenate([fit.features[n:], fit.features[:n]]),
        1 - fit.targets,
        fit.weights,
        -fit.margins,
        fit.groups,
    )
    one, two = solve(fit).weights, solve(turned).weights
    np.testing.assert_allclose(one.weight, two.weight, atol=1e-4)


def test_heads_of_one_view_need_something_that_makes_them_differ() -> None:
    fit = planted(100, 1)
    with pytest.raises(OptionError, match="one optimum"):
        solve(fit, views=[0, 0])
    for more in ({"bootstrap": True}, {"subspace": 0.5}):
        weights = solve(fit, views=[0, 0], **more).weights
        assert not np.allclose(weights.weight[0], weights.weight[1])


def test_nan_features_are_named() -> None:
    fit = planted(50, 1)
    fit.features[3, 1, 0] = np.nan
    with pytest.raises(TrainingError, match="member 1"):
        solve(fit)


@pytest.mark.parametrize("name", ["epochs", "patience", "batch_size"])
def test_options_of_adam_are_not_ignored(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}=3 belongs to solver='adam'"):
        HeadRecipe(**{name: 3})
    assert getattr(HeadRecipe(solver="adam", **{name: 3}), name) == 3
