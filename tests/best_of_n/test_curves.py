"""Best of n: against every subset and exact binomials; KL; Gao's curves; an ensemble's choice."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb, inf, log

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ensemble_rm import FunctionScorer, RewardEnsemble
from ensemble_rm.aggregation import mean, minimum
from ensemble_rm.best_of_n import (
    best_of_n,
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_weights,
    fit_curve,
)
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import DataError, NonFiniteScoreError, OptionError

INTEGERS = st.integers(-3, 3)  # few values: ties are the rule


def over_subsets(proxy: list[int], gold: list[int], n: int) -> Fraction:
    """The mean over all subsets of n of the mean gold of its maximal elements."""
    total = Fraction(0)
    subsets = list(combinations(range(len(proxy)), n))
    for subset in subsets:
        best = max(proxy[i] for i in subset)
        winners = [gold[i] for i in subset if proxy[i] == best]
        total += Fraction(sum(winners), len(winners))
    return total / len(subsets)


def over_binomials(proxy: np.ndarray, gold: np.ndarray, n: int) -> Fraction:
    """The plain loop of the paper; no ties."""
    total = Fraction(0)
    for i, worth in enumerate(gold[np.argsort(proxy)], start=1):
        total += Fraction(comb(i - 1, n - 1), comb(len(proxy), n)) * Fraction(float(worth))
    return total


@given(st.lists(st.tuples(INTEGERS, INTEGERS), min_size=1, max_size=9))
def test_it_is_the_mean_over_every_subset(rows: list[tuple[int, int]]) -> None:
    proxy, gold = [list(column) for column in zip(*rows, strict=True)]
    sizes = list(range(1, len(rows) + 1))
    exact = [float(over_subsets(proxy, gold, n)) for n in sizes]
    np.testing.assert_allclose(best_of_n_curve(proxy, gold, sizes), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("samples", [1, 2, 17, 400, 3000])
def test_it_is_the_plain_loop_over_exact_binomials(samples: int) -> None:
    rng = np.random.default_rng(samples)
    proxy, gold = rng.normal(size=(2, samples))
    sizes = sorted({1, min(2, samples), max(1, samples // 3), samples})
    exact = [float(over_binomials(proxy, gold, n)) for n in sizes]
    np.testing.assert_allclose(best_of_n_curve(proxy, gold, sizes), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("samples", "n"), [(12_600, 12_500), (12_600, 6_300), (100_000, 3)])
def test_weights_are_the_exact_binomials(samples: int, n: int) -> None:
    (weights,) = best_of_n_weights(samples, [n])
    assert weights[: n - 1].sum() == 0
    for i in (n, (n + samples) // 2, samples - 1, samples):
        exact = float(Fraction(comb(i - 1, n - 1), comb(samples, n)))
        assert weights[i - 1] == pytest.approx(exact, rel=1e-10)
    assert weights.sum() == pytest.approx(1, abs=1e-14)


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_one_is_the_mean_and_all_is_the_maximum(samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    proxy, gold = rng.normal(size=(2, samples))
    one, every = best_of_n_curve(proxy, gold, [1, samples])
    assert one == pytest.approx(gold.mean(), abs=1e-12)
    assert every == gold[np.argmax(proxy)]


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_a_monotone_proxy_never_loses_and_shifts_pass_through(samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=samples)
    sizes = np.arange(1, samples + 1)
    curve = best_of_n_curve(np.exp(gold), gold, sizes)
    assert (np.diff(curve) > -1e-12).all()
    np.testing.assert_allclose(best_of_n_curve(gold, 2 * gold + 1, sizes), 2 * curve + 1, atol=1e-9)
    # Of any two proxies the one that orders as gold does is the better at every n.
    other = best_of_n_curve(rng.normal(size=samples), gold, sizes)
    assert (other <= curve + 1e-12).all()


@given(st.lists(st.tuples(INTEGERS, INTEGERS), min_size=2, max_size=12), st.randoms())
def test_the_order_of_samples_changes_nothing(rows: list[tuple[int, int]], random: object) -> None:
    moved = list(rows)
    random.shuffle(moved)  # type: ignore[attr-defined]
    sizes = range(1, len(rows) + 1)
    first, second = (best_of_n_curve(*np.transpose(part), list(sizes)) for part in (rows, moved))
    np.testing.assert_allclose(first, second, atol=1e-13)


def test_a_constant_proxy_is_no_choice() -> None:
    gold = np.random.default_rng(0).normal(size=50)
    np.testing.assert_allclose(best_of_n_curve(np.zeros(50), gold, [1, 7, 50]), gold.mean())


def test_prompts_are_rows_and_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, gold = np.random.default_rng(0).integers(0, 9, size=(2, 5, 30)).astype(float)
    whole = best_of_n_curve(proxy, gold, [1, 4, 30])
    assert whole.shape == (5, 3)
    alone = [best_of_n_curve(*pair, [1, 4, 30]) for pair in zip(proxy, gold, strict=True)]
    np.testing.assert_allclose(whole, alone, rtol=0, atol=1e-13)
    monkeypatch.setattr("ensemble_rm.best_of_n.curves._BLOCK", 60)
    np.testing.assert_allclose(best_of_n_curve(proxy, gold, [1, 4, 30]), whole, atol=1e-13)
    assert best_of_n_curve(proxy, gold, 4).shape == (5,)
    assert best_of_n_curve(proxy[0], gold[0], 4).shape == ()


def test_it_is_unbiased_for_the_best_of_fresh_samples() -> None:
    """Gold = proxy, standard normal: E max of 4 is 1.02938 (order statistics' tables)."""
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(4000, 10))
    curve = best_of_n_curve(proxy, proxy, 4)
    assert curve.mean() == pytest.approx(1.02938, abs=4 * curve.std() / np.sqrt(len(curve)))


@pytest.mark.parametrize("n", [0, -1, 6, 1.5, [], [[1]], "2", True])
def test_an_impossible_n_is_named(n: object) -> None:
    with pytest.raises(OptionError, match=r"best of 6|n must"):
        best_of_n_curve(np.arange(5), np.arange(5), n)


def test_bad_scores_are_named() -> None:
    with pytest.raises(OptionError, match=r"\(5,\) and \(4,\)"):
        best_of_n_curve(np.arange(5), np.arange(4), 1)
    with pytest.raises(NonFiniteScoreError, match=r"1 gold scores .* \(1,\)"):
        best_of_n_curve([1, 2], [0, np.nan], 1)
    with pytest.raises(NonFiniteScoreError, match=r"1 proxy scores"):
        best_of_n_curve([1, np.inf], [0, 0], 1)


def test_kl_is_that_of_the_maximum_of_n() -> None:
    assert best_of_n_kl(1) == 0
    np.testing.assert_allclose(best_of_n_kl([2, 10]), [log(2) - 0.5, log(10) - 0.9])
    # Density of the maximum of uniforms: n u^(n−1), so KL = ∫ n u^(n−1) log(n u^(n−1)) du.
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (3, 8):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-8)


@given(st.integers(2, 6), st.integers(1, 12))
def test_kl_bounds_that_of_discrete_samples(values: int, n: int) -> None:
    """Best of n of a uniform choice of few values: P(max = v) = (v/m)^n − ((v−1)/m)^n."""
    v = np.arange(1, values + 1)
    p = (v / values) ** n - ((v - 1) / values) ** n
    exact = (p * np.log(p * values)).sum()
    assert exact <= best_of_n_kl(n) + 1e-12


@pytest.mark.parametrize(("form", "peak"), [("best_of_n", 2.5), ("rl", float(np.exp(4.0)))])
def test_a_planted_curve_is_recovered(form: str, peak: float) -> None:
    d = np.linspace(0, 3, 12)
    logs = np.log(np.where(d > 0, d, 1))
    gold = d * (1.0 - 0.2 * (d if form == "best_of_n" else logs))
    fit = fit_curve(d, gold, form=form)  # type: ignore[arg-type]
    assert (fit.alpha, fit.beta) == (pytest.approx(1.0), pytest.approx(0.2))
    assert fit.peak == pytest.approx(peak)
    np.testing.assert_allclose(fit(d), gold, atol=1e-12)
    near = fit(np.array([0.999, 1.0, 1.001]) * fit.peak)
    assert near[1] >= near.max()


@pytest.mark.parametrize("curves", [1, 8])
def test_intervals_hold_what_was_planted(curves: int) -> None:
    d = np.linspace(0.2, 4, 10)
    truth = d * (1.0 - 0.15 * d)
    held = np.zeros(3)
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(0, 0.3, size=(curves, 10))
        fit = fit_curve(d, truth + noise)
        planted = (1.0, 0.15, 1.0 / 0.3)
        found = (fit.alpha_interval, fit.beta_interval, fit.peak_interval)
        held += [low <= true <= high for true, (low, high) in zip(planted, found, strict=True)]
        assert fit.peak_interval[0] <= fit.peak <= fit.peak_interval[1]
    # 95 % of 300, and four standard errors of a binomial.
    assert (abs(held / 300 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 300)).all(), held / 300


def test_a_curve_that_bends_upwards_has_no_peak() -> None:
    d = np.linspace(0.1, 3, 20)
    fit = fit_curve(d, d + 0.1 * d**2 + np.random.default_rng(0).normal(0, 1e-3, 20))
    assert (fit.peak, fit.peak_interval) == (inf, (inf, inf))


@given(st.integers(0, 2**32), st.floats(-1, 1), st.floats(-1, 1), st.integers(1, 4))
def test_the_peak_lies_in_its_interval(seed: int, alpha: float, beta: float, curves: int) -> None:
    d = np.linspace(0.2, 3, 5)
    noise = np.random.default_rng(seed).normal(0, 0.5, size=(curves, 5))
    for form in ("best_of_n", "rl"):
        fit = fit_curve(d, d * (alpha - beta * d) + noise, form=form)  # type: ignore[arg-type]
        low, high = fit.peak_interval
        assert 0 <= low <= fit.peak * (1 + 1e-9) and fit.peak <= high * (1 + 1e-9)


def test_a_peak_that_cannot_be_told_has_no_end() -> None:
    d = np.linspace(0.1, 1, 6)
    fit = fit_curve(d, d + np.random.default_rng(0).normal(0, 0.1, 6))
    assert fit.peak_interval[1] == inf and 0 <= fit.peak_interval[0] <= fit.peak


@pytest.mark.parametrize(
    ("d", "gold", "error"),
    [
        ([0, 1], [0, 1], OptionError),
        ([-1, 1, 2], [0, 1, 2], OptionError),
        ([1, 2, 3], [0, 1], OptionError),
        ([1, 2, 3], [0, 1, np.nan], NonFiniteScoreError),
    ],
)
def test_what_cannot_be_fitted_is_named(d: object, gold: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        fit_curve(d, gold)
    with pytest.raises(OptionError, match="form"):
        fit_curve([1, 2, 3], [1, 2, 3], form="gao")  # type: ignore[arg-type]


@pytest.fixture
def ensemble() -> RewardEnsemble:
    longer = FunctionScorer("long", lambda s: float(len(s.completion)))
    shorter = FunctionScorer("few a", lambda s: -3.0 * s.completion.count("a"))
    return RewardEnsemble((longer, shorter), Normaliser.identity(2), mean())


def test_the_best_is_chosen_by_any_aggregator(ensemble: RewardEnsemble) -> None:
    texts = [["b", "aaaa", "bbb"], ["aa"]]
    best = best_of_n(ensemble, ["p", "q"], texts)
    assert [(b.index, b.completion, b.reward) for b in best] == [(2, "bbb", 1.5), (0, "aa", -2.0)]
    cautious = best_of_n(ensemble, ["p", "q"], texts, aggregator=minimum())
    assert [b.reward for b in cautious] == [0.0, -6.0]
    (tied,) = best_of_n(ensemble, ["p"], [["bb", "cc"]])
    assert tied.index == 0


def test_a_prompt_without_completions_is_named(ensemble: RewardEnsemble) -> None:
    with pytest.raises(DataError, match="prompt 1"):
        best_of_n(ensemble, ["p", "q"], [["a"], []])
