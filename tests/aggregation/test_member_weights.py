"""Aggregators with member weights: the formulas, and the laws that hold for all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

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
from ensemble_rm.errors import NonFiniteScoreError, OneMemberError, OptionError

PLAIN = [mean(), minimum(), uwo(0.5), lcb(1.0), entropic(0.7), median(), quantile(0.3), cvar(0.4)]
each = pytest.mark.parametrize("plain", PLAIN, ids=str)
# Where continuity or monotonicity in each score is a law; UWO and LCB fall with a rising outlier.
monotone = pytest.mark.parametrize(
    "plain", [a for a in PLAIN if a.name not in ("uwo", "lcb")], ids=str
)


@st.composite
def weighted(draw: st.DrawFn, *, lowest: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Draw scores (n, k) and k weights ≥ `lowest`, at least two of them above 0."""
    k = draw(st.integers(2, 6))
    rows = st.lists(st.floats(-50, 50, width=32), min_size=k, max_size=k)
    scores = np.array(draw(st.lists(rows, min_size=1, max_size=5)), dtype=np.float64)
    # Zero, or no less than 1e-3: a weight of 1e-300 is no different from rounding.
    positive = st.floats(max(lowest, 1e-3), 10)
    weight = positive if lowest > 0 else st.just(0.0) | positive
    weights = np.array(draw(st.lists(weight, min_size=k, max_size=k)))
    assume((weights > 0).sum() >= 2)
    return scores, weights


def named(plain: Aggregator, weights: np.ndarray, order: np.ndarray | None = None) -> Aggregator:
    """Return the aggregator with the weights of members m0, m1, … in the order of its columns."""
    names = [f"m{i}" for i in range(len(weights))]
    columns = names if order is None else [names[i] for i in order]
    aggregator = make_aggregator(
        plain.name,
        nan=plain.nan,
        min_members=plain.min_members,
        weights=dict(zip(names, weights.tolist(), strict=True)),
        **dict(plain.parameters),
    )
    return aggregator.bind(columns)


def close(a: object, b: object, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)  # type: ignore[arg-type]


@given(weighted())
def test_formulas_against_numpy(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    x, weights = drawn
    w = weights / weights.sum()
    average = np.average(x, axis=1, weights=w)
    variance = np.average((x - average[:, None]) ** 2, axis=1, weights=w)
    close(named(mean(), weights)(x), average)
    close(named(minimum(), weights)(x), x[:, weights > 0].min(axis=1))
    close(named(uwo(0.3), weights)(x), average - 0.3 * variance)
    close(named(lcb(0.3), weights)(x), average - 0.3 * np.sqrt(variance), 1e-6)
    close(named(entropic(2.0), weights)(x), -2 * np.log(np.exp(-x / 2) @ w))


def empirical_quantile(x: np.ndarray, w: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the weighted empirical quantile function of one row of scores."""
    order = np.argsort(x)
    ends = np.cumsum(w[order])
    return x[order][np.minimum(np.searchsorted(ends, at, side="right"), len(x) - 1)]


@given(weighted(), st.floats(0, 1), st.floats(0.05, 1))
def test_order_statistics_are_integrals_of_the_weighted_quantile_function(
    drawn: tuple[np.ndarray, np.ndarray], q: float, alpha: float
) -> None:
    """Integrate on a fine grid: the quantile over a window of width 1/n*, CVaR over [0, α]."""
    x, weights = drawn
    w = weights / weights.sum()
    width = float((w**2).sum())
    steps = (np.arange(20_000) + 0.5) / 20_000
    start = q * (1 - width)
    tolerance = 5e-4 * (np.ptp(x) + 1)
    for row, value, tail in zip(
        x, named(quantile(q), weights)(x), named(cvar(alpha), weights)(x), strict=True
    ):
        assert value == pytest.approx(
            empirical_quantile(row, w, start + width * steps).mean(), abs=tolerance
        )
        assert tail == pytest.approx(
            empirical_quantile(row, w, alpha * steps).mean(), abs=tolerance
        )


@each
@given(weighted(), st.floats(1e-3, 1e3))
def test_equal_weights_give_the_values_without_weights(
    plain: Aggregator, drawn: tuple[np.ndarray, np.ndarray], weight: float
) -> None:
    x, weights = drawn
    equal = named(plain, np.full(len(weights), weight))
    close(equal(x), plain(x), 1e-12 if plain.name not in ("uwo", "lcb") else 1e-11)


@each
@given(weighted())
def test_weight_0_leaves_the_member_out(
    plain: Aggregator, drawn: tuple[np.ndarray, np.ndarray]
) -> None:
    x, weights = drawn
    used = weights > 0
    assert (named(plain, weights)(x) == named(plain, weights[used])(x[:, used])).all()
    # Not even its NaN or its infinity is read.
    unread = np.where(used, x, np.nan)
    assert (named(plain, weights)(unread) == named(plain, weights)(x)).all()
    unread = np.where(used, x, np.inf)
    assert (named(plain, weights).where_enough(unread) == named(plain, weights)(x)).all()


@each
@given(weighted(), st.integers(0, 99))
def test_permuting_the_members_changes_nothing(
    plain: Aggregator, drawn: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    x, weights = drawn
    order = np.random.default_rng(seed).permutation(len(weights))
    permuted = named(plain, weights, order)
    assert (permuted(x[:, order]) == named(plain, weights)(x)).all()
    assert permuted == named(plain, weights)


@each
@given(weighted(lowest=1e-3), st.integers(0, 5))
def test_a_missing_member_leaves_the_proportions_of_the_others(
    plain: Aggregator, drawn: tuple[np.ndarray, np.ndarray], column: int
) -> None:
    x, weights = drawn
    gone = column % len(weights)
    rest = np.delete(np.arange(len(weights)), gone)
    assume(len(rest) >= 2)
    omitting = Aggregator(plain.name, plain.parameters, nan="omit")
    holed = np.where(np.arange(len(weights)) == gone, np.nan, x)
    close(named(omitting, weights)(holed), named(plain, weights[rest])(x[:, rest]))


@each
@given(weighted())
def test_between_the_lowest_and_the_highest(
    plain: Aggregator, drawn: tuple[np.ndarray, np.ndarray]
) -> None:
    x, weights = drawn
    used = x[:, weights > 0]
    result = named(plain, weights)(x)
    assert (result <= used.max(axis=1)).all()
    if plain.name not in ("uwo", "lcb"):
        assert (result >= used.min(axis=1)).all()


@monotone
@given(weighted(), st.floats(0, 5), st.integers(0, 5))
def test_a_better_member_never_lowers_the_score_and_never_makes_it_jump(
    plain: Aggregator, drawn: tuple[np.ndarray, np.ndarray], rise: float, column: int
) -> None:
    x, weights = drawn
    better = x.copy()
    better[:, column % len(weights)] += rise
    aggregator = named(plain, weights)
    gain = aggregator(better) - aggregator(x)
    assert (gain >= -1e-9).all()
    assert (gain <= rise + 1e-9).all()  # continuous, also where two members swap places


@each
@given(weighted(), st.floats(1e-3, 1e3))
def test_only_the_proportions_of_the_weights_count(
    plain: Aggregator, drawn: tuple[np.ndarray, np.ndarray], factor: float
) -> None:
    x, weights = drawn
    one, other = named(plain, weights), named(plain, factor * weights)
    assert math.fsum(weight for _, weight in one.weights) == pytest.approx(1, abs=1e-12)
    close(dict(one.weights)["m0"], dict(other.weights)["m0"], 1e-14)
    close(one(x), other(x), 1e-10)


@each
@given(weighted())
def test_json_round_trip(plain: Aggregator, drawn: tuple[np.ndarray, np.ndarray]) -> None:
    x, weights = drawn
    aggregator = named(plain, weights)
    read = Aggregator.from_json(aggregator.to_json())
    assert read == aggregator
    assert hash(read) == hash(aggregator)
    assert (read(x) == aggregator(x)).all()  # its columns are known, too


def test_what_was_saved_before_there_were_weights_is_the_same() -> None:
    saved = {"name": "lcb", "parameters": {"kappa": 1.0}, "nan": "omit", "min_members": 2}
    assert Aggregator.from_json(saved).to_json() == saved


def test_weights_are_part_of_the_identity() -> None:
    one, other = ({"rule": 1, "judge": weight} for weight in (3, 2))
    assert lcb(1.0, weights=one) == lcb(1.0, weights={"judge": 0.75, "rule": 0.25})
    assert lcb(1.0, weights=one) != lcb(1.0, weights=other)
    assert lcb(1.0, weights=one) != lcb(1.0)
    assert str(lcb(1.0, weights=one)) == "lcb(kappa=1.0, weights={'judge': 0.75, 'rule': 0.25})"
    assert lcb(1.0, weights=one).bind(("rule", "judge")).with_rule("mean") == mean(weights=one)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "empty"),
        ({"a": -1.0, "b": 2.0}, "'a' must be a finite number ≥ 0"),
        ({"a": math.nan, "b": 2.0}, "'a' must be a finite number ≥ 0"),
        ({"a": math.inf, "b": 2.0}, "'a' must be a finite number ≥ 0"),
        ({"a": True, "b": 2.0}, "'a' must be a finite number ≥ 0"),
        ({"a": "1", "b": 2.0}, "'a' must be a finite number ≥ 0"),
        ({"a": 0.0, "b": 0}, "at least one weight must be above 0"),
        ({0: 1.0, 1: 2.0}, "by member name"),
    ],
)
def test_bad_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        mean(weights=weights)


def test_names_must_be_those_of_the_members() -> None:
    aggregator = mean(weights={"rule": 1.0, "judge": 3.0})
    with pytest.raises(OptionError, match=r"weights name 'judge', and the members are 'rule', 'x'"):
        aggregator.bind(["rule", "x"])
    with pytest.raises(OptionError, match="no weight for 'x'"):
        aggregator.bind(["rule", "judge", "x"])
    with pytest.raises(OptionError, match="which column is which member"):
        aggregator([[1.0, 2.0]])
    with pytest.raises(OptionError, match="3 columns"):
        aggregator.bind(["rule", "judge"])([[1.0, 2.0, 3.0]])
    assert aggregator.bind(["judge", "rule"])([[1.0, 5.0]]) == 2.0


def test_extreme_weights_neither_overflow_nor_vanish() -> None:
    huge = mean(weights={"a": 1e308, "b": 1e308}).bind(["a", "b"])
    assert huge([[1.0, 3.0]]) == 2.0
    tiny = mean(weights={"a": 5e-324, "b": 5e-324}).bind(["a", "b"])
    assert tiny([[1.0, 3.0]]) == 2.0


def test_counts_are_of_members_with_a_weight() -> None:
    spread = lcb(1.0, weights={"a": 1.0, "b": 0.0}).bind(["a", "b"])
    with pytest.raises(OneMemberError, match="at least 2"):
        spread([[1.0, 2.0]])
    two = make_aggregator("mean", min_members=2, weights={"a": 1.0, "b": 0.0}).bind(["a", "b"])
    with pytest.raises(OptionError, match="scores of 1 members"):
        two([[1.0, 2.0]])
    weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    omitting = make_aggregator("lcb", nan="omit", weights=weights, kappa=1.0).bind(["a", "b", "c"])
    rows = np.array([[1.0, np.nan, 5.0], [1.0, 3.0, np.nan]])
    result = omitting.where_enough(rows)
    assert np.isnan(result[0])  # member c has no weight, so a alone is left
    assert result[1] == pytest.approx(2.0 - 1.0)


def test_messages_name_the_member() -> None:
    with pytest.raises(NonFiniteScoreError, match="row 0 member judge"):
        mean(weights={"rule": 1.0, "judge": 3.0}).bind(["rule", "judge"])([[1.0, np.nan]])
