"""The laws of the aggregators, against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ensemble_rm.aggregation import (
    Aggregator,
    cvar,
    entropic,
    lcb,
    make_aggregator,
    mean,
    median,
    minimum,
    quantile,
    uwo,
)
from ensemble_rm.errors import NonFiniteScoreError, OneMemberError, OptionError, SchemaError

MATRICES = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=7),
    elements=st.floats(-50, 50, width=32),
)
ALL = [mean(), minimum(), uwo(0.5), lcb(1.0), entropic(0.7), median(), quantile(0.3), cvar(0.4)]
each = pytest.mark.parametrize("aggregator", ALL, ids=str)
MONOTONE = [mean(), minimum(), entropic(0.7), median(), quantile(0.3), cvar(0.4)]


def close(a: object, b: object) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]


@given(MATRICES)
def test_formulas_against_numpy(x: np.ndarray) -> None:
    close(mean()(x), x.mean(1))
    close(minimum()(x), x.min(1))
    close(uwo(0.3)(x), x.mean(1) - 0.3 * x.var(1))
    close(lcb(0.3)(x), x.mean(1) - 0.3 * x.std(1))
    close(median()(x), np.median(x, axis=1))
    close(quantile(0.3)(x), np.quantile(x, 0.3, axis=1))
    direct = -2.0 * np.log(np.exp(-x / 2.0).mean(1))
    close(entropic(2.0)(x), direct)


@given(MATRICES, st.integers(1, 7))
def test_cvar_of_whole_members_is_their_mean(x: np.ndarray, m: int) -> None:
    k = x.shape[1]
    m = min(m, k)
    close(cvar(m / k)(x), np.sort(x, axis=1)[:, :m].mean(1))


@each
@given(x=MATRICES, shift=st.floats(-20, 20), seed=st.integers(0, 99))
def test_order_of_members_and_shift(
    aggregator: Aggregator, x: np.ndarray, shift: float, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(x.shape[1])
    assert (aggregator(x[:, order]) == aggregator(x)).all()
    close(aggregator(x + shift), aggregator(x) + shift)


@each
@given(x=MATRICES)
def test_between_the_lowest_and_the_highest(aggregator: Aggregator, x: np.ndarray) -> None:
    found = aggregator(x)
    assert (found <= x.max(1)).all()
    if aggregator.name not in ("uwo", "lcb"):
        assert (found >= x.min(1)).all()
    if aggregator.name in ("uwo", "lcb", "entropic", "cvar", "minimum"):
        assert (found <= mean()(x)).all()


@each
def test_equal_members_agree_with_each(aggregator: Aggregator) -> None:
    x = np.repeat(np.linspace(-3, 3, 7)[:, None], 4, axis=1)
    close(aggregator(x), x[:, 0])


@pytest.mark.parametrize("aggregator", MONOTONE, ids=str)
@given(x=MATRICES, rise=st.floats(0, 5), column=st.integers(0, 6))
def test_a_better_member_never_lowers_the_score(
    aggregator: Aggregator, x: np.ndarray, rise: float, column: int
) -> None:
    better = x.copy()
    better[:, column % x.shape[1]] += rise
    assert (aggregator(better) >= aggregator(x) - 1e-9).all()


@given(MATRICES)
def test_limits(x: np.ndarray) -> None:
    assert (uwo(0)(x) == mean()(x)).all()
    assert (lcb(0)(x) == mean()(x)).all()
    assert (quantile(0)(x) == minimum()(x)).all()
    close(quantile(0.5)(x), median()(x))
    close(cvar(1.0)(x), mean()(x))
    close(cvar(1e-9)(x), minimum()(x))
    np.testing.assert_allclose(entropic(1e-9)(x), minimum()(x), atol=1e-7)
    np.testing.assert_allclose(entropic(1e9)(x), mean()(x), atol=1e-5)


@given(MATRICES, st.floats(0.05, 5), st.floats(1.1, 5))
def test_soft_minimum_rises_with_beta(x: np.ndarray, beta: float, factor: float) -> None:
    assert (entropic(beta)(x) <= entropic(beta * factor)(x) + 1e-9).all()


@each
def test_rows_do_not_touch_each_other(aggregator: Aggregator) -> None:
    x = np.random.default_rng(0).normal(size=(50, 5))
    whole = aggregator(x)
    assert all(aggregator(x[i : i + 1])[0] == whole[i] for i in range(50))


def test_nan_raises_or_is_left_out_as_asked() -> None:
    x = np.array([[1.0, 2.0, np.nan], [1.0, 2.0, 6.0]])
    with pytest.raises(NonFiniteScoreError, match="row 0 member 2"):
        mean()(x)
    left = make_aggregator("mean", nan="omit", min_members=2)
    close(left(x), [1.5, 3.0])
    with pytest.raises(NonFiniteScoreError, match="min_members=3"):
        make_aggregator("mean", nan="omit", min_members=3)(x)
    with pytest.raises(NonFiniteScoreError, match="infinite"):
        left([[1.0, 2.0, np.inf]])


@given(MATRICES)
def test_omitting_a_member_is_the_aggregate_of_the_others(x: np.ndarray) -> None:
    holed = np.column_stack([x, np.full(len(x), np.nan)])
    for aggregator in ALL:
        omitting = Aggregator(aggregator.name, aggregator.parameters, "omit")
        close(omitting(holed), aggregator(x))


@pytest.mark.parametrize("make", [lambda: uwo(0.5), lambda: lcb(0.5)])
def test_one_member_has_no_spread(make: object) -> None:
    with pytest.raises(OneMemberError, match="at least 2"):
        make()([[1.0]])  # type: ignore[operator]
    assert uwo(0)([[1.0]])[0] == 1.0


@pytest.mark.parametrize(
    ("name", "coefficients"),
    [
        ("lcb", {}),
        ("mean", {"kappa": 1.0}),
        ("lcb", {"kappa": -1.0}),
        ("lcb", {"kappa": math.nan}),
        ("lcb", {"kappa": True}),
        ("entropic", {"beta": 0.0}),
        ("quantile", {"q": 1.5}),
        ("cvar", {"alpha": 0.0}),
        ("nobody", {}),
    ],
)
def test_bad_coefficients(name: str, coefficients: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        make_aggregator(name, **coefficients)


@pytest.mark.parametrize("scores", [[1.0, 2.0], [[]], [["a"]], np.zeros((2, 2, 2)), [[True]]])
def test_bad_shapes(scores: object) -> None:
    with pytest.raises(OptionError):
        mean()(scores)  # type: ignore[arg-type]


@each
def test_json_round_trip(aggregator: Aggregator) -> None:
    assert Aggregator.from_json(aggregator.to_json()) == aggregator
    with pytest.raises(SchemaError, match="parameters: missing"):
        Aggregator.from_json({"name": "mean"})
