"""The KL penalty: estimators against the exact divergence, shaping, controllers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ensemble_rm.errors import NonFiniteScoreError, OptionError
from ensemble_rm.rl import AdaptiveKL, FixedKL, sequence_kl, shape_rewards


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_unbiased(estimator: str) -> None:
    """Three independent tokens of a known categorical policy and reference."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.full(5, 3.0))
    exact = 3 * float((p * np.log(p / q)).sum())
    tokens = rng.choice(5, p=p, size=(40_000, 3))
    mask = np.ones_like(tokens)
    found = sequence_kl(np.log(p)[tokens], np.log(q)[tokens], mask, estimator=estimator)  # type: ignore[arg-type]
    assert found.mean() == pytest.approx(exact, abs=4 * found.std() / 200)


@given(st.integers(0, 2**32))
def test_k3_is_never_negative_and_padding_is_not_read(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p, q = np.log(rng.random((2, 4, 6)))
    mask = rng.random((4, 6)) < 0.6
    assert (sequence_kl(p, q, mask, estimator="k3") >= 0).all()
    whole = sequence_kl(p, q, mask)
    p[~mask], q[~mask] = np.nan, -np.inf
    np.testing.assert_array_equal(sequence_kl(p, q, mask), whole)
    np.testing.assert_array_equal(sequence_kl(p, p, mask), 0)


def test_shaping_subtracts_and_failed_samples_stay_failed() -> None:
    shaped = shape_rewards([1.0, np.nan], [2.0, 3.0], beta=0.5)
    np.testing.assert_array_equal(shaped, [0.0, np.nan])
    np.testing.assert_array_equal(shape_rewards([1.0], [9.0], beta=0.0), [1.0])


def test_the_controller_holds_a_policy_that_answers_to_it() -> None:
    """A policy whose KL is 1/β: the optimum of R(d) = log d − βd."""
    controller = AdaptiveKL(beta=1.0, target=20.0)
    for _ in range(400):
        controller = controller.update(1 / controller.beta)
    assert 1 / controller.beta == pytest.approx(20.0, rel=1e-3)


@given(st.floats(1e-3, 10), st.floats(0.1, 100), st.floats(-10, 1000))
def test_one_step_moves_beta_by_at_most_two_percent(beta: float, target: float, kl: float) -> None:
    after = AdaptiveKL(beta, target).update(kl).beta
    assert 0.98 * beta * (1 - 1e-12) <= after <= 1.02 * beta * (1 + 1e-12)
    assert np.sign(after - beta) in (np.sign(kl - target), 0)


def test_a_fixed_one_stays() -> None:
    fixed = FixedKL(0.01)
    assert fixed.update(50.0) is fixed and FixedKL(0.0).beta == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedKL(-1.0),
        lambda: FixedKL(float("nan")),
        lambda: AdaptiveKL(0.0, 1.0),
        lambda: AdaptiveKL(1.0, 0.0),
        lambda: AdaptiveKL(1.0, 1.0, gain=5.0),
        lambda: AdaptiveKL(1.0, 1.0).update(float("nan")),
        lambda: FixedKL(1.0).update(float("inf")),
        lambda: shape_rewards([1.0], [1.0], beta=-0.1),
        lambda: shape_rewards([1.0], [1.0, 2.0], beta=0.1),
        lambda: sequence_kl([[0.0]], [[0.0]], [[1]], estimator="k2"),  # type: ignore[arg-type]
        lambda: sequence_kl([[0.0]], [[0.0, 1.0]], [[1]]),
    ],
)
def test_impossible_values_are_named(make: object) -> None:
    with pytest.raises(OptionError):
        make()  # type: ignore[operator]


def test_a_token_without_a_probability_is_named() -> None:
    with pytest.raises(NonFiniteScoreError, match="sample 1"):
        sequence_kl([[0.0], [-np.inf]], [[0.0], [0.0]], [[1], [1]])
