"""Uncertainty: the split adds up, has the right limits, and refuses one member."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from ensemble_rm.errors import OneMemberError
from ensemble_rm.uncertainty.disagreement import (
    binary_entropy,
    effective_size,
    margin_correlation,
    mean_correlation,
    member_std,
    split_uncertainty,
)

MARGINS = arrays(np.float64, (6, 4), elements=st.floats(-30, 30))


@given(MARGINS, st.floats(0.2, 5))
def test_the_split_adds_up_and_is_never_negative(x: np.ndarray, t: float) -> None:
    split = split_uncertainty(x, mixture_temperature=t)
    np.testing.assert_allclose(split.total, split.aleatoric + split.epistemic, atol=1e-12)
    assert (split.epistemic >= 0).all()
    assert (split.total <= np.log(2) + 1e-12).all()
    p = 1 / (1 + np.exp(-x / t))
    np.testing.assert_allclose(split.mixture_probability, p.mean(1), atol=1e-12)


@given(MARGINS)
def test_the_split_does_not_see_which_side_is_first(x: np.ndarray) -> None:
    one = split_uncertainty(x, mixture_temperature=1.0)
    two = split_uncertainty(-x, mixture_temperature=1.0)
    np.testing.assert_allclose(one.epistemic, two.epistemic, atol=1e-12)
    np.testing.assert_allclose(one.mixture_probability, 1 - two.mixture_probability, atol=1e-12)


def test_members_that_agree_have_no_epistemic_part() -> None:
    split = split_uncertainty(np.full((3, 5), 0.7), mixture_temperature=1.0)
    np.testing.assert_allclose(split.epistemic, 0, atol=1e-12)


def test_members_sure_of_opposites_are_all_epistemic() -> None:
    split = split_uncertainty([[60.0, -60.0]], mixture_temperature=1.0)
    np.testing.assert_allclose(split.epistemic, np.log(2), atol=1e-9)
    np.testing.assert_allclose(split.aleatoric, 0, atol=1e-9)


def test_one_member_is_a_named_error() -> None:
    for ask in (
        lambda: member_std([[1.0]]),
        lambda: split_uncertainty([[1.0]], mixture_temperature=1.0),
        lambda: margin_correlation([[1.0], [2.0]]),
    ):
        with pytest.raises(OneMemberError):
            ask()


def test_std_is_unbiased_in_the_variance() -> None:
    x = np.random.default_rng(0).normal(0, 2, (20000, 5))
    assert (member_std(x) ** 2).mean() == pytest.approx(4.0, rel=0.03)
    np.testing.assert_allclose(member_std(x), np.std(x, axis=1, ddof=1))


def test_binary_entropy() -> None:
    np.testing.assert_allclose(binary_entropy([0.0, 0.5, 1.0]), [0, np.log(2), 0], atol=1e-15)


def test_correlation_and_effective_size_on_planted_errors() -> None:
    rng = np.random.default_rng(1)
    shared, own = rng.normal(size=(20000, 1)), rng.normal(size=(20000, 5))
    x = np.sqrt(0.5) * shared + np.sqrt(0.5) * own
    assert mean_correlation(margin_correlation(x)) == pytest.approx(0.5, abs=0.02)
    assert effective_size(x) == pytest.approx(5 / 3, rel=0.05)
    assert effective_size(own) == pytest.approx(5, rel=0.05)
