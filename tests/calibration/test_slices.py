"""One temperature a slice: shrinkage between own and global, planted differences, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.special import expit

from ensemble_rm import Calibration
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import ScoredPairs
from ensemble_rm.calibration.calibration import fit_calibration
from ensemble_rm.calibration.slices import between_variance
from ensemble_rm.errors import OptionError


def sliced(truths: dict[str | None, tuple[float, int]], seed: int = 0) -> ScoredPairs:
    """Pairs of each subset with its temperature and number."""
    rng = np.random.default_rng(seed)
    x, y, names = [], [], []
    for name, (t, n) in truths.items():
        margins = rng.normal(0, 3, n)
        x.append(margins)
        y.append((rng.random(n) < expit(margins / t)).astype(float))
        names += [name] * n
    first = np.concatenate(x)[:, None]
    n = len(first)
    return ScoredPairs(
        first, 0 * first, np.concatenate(y), np.ones(n), np.arange(n) // 2, tuple(names)
    )


def fit(pairs: ScoredPairs) -> Calibration:
    return fit_calibration(pairs, mean(), slices=True)


def test_planted_temperatures_are_recovered_from_many_judgments() -> None:
    truths: dict[str | None, tuple[float, int]] = {
        "a": (0.5, 6000),
        "b": (1.5, 6000),
        "c": (4.0, 6000),
    }
    calibration = fit(sliced(truths))
    assert [s.name for s in calibration.slices] == ["a", "b", "c"]
    for one in calibration.slices:
        assert one.temperature == pytest.approx(truths[one.name][0], rel=0.1)
        assert one.share > 0.95


@given(st.integers(0, 30))
def test_a_shrunk_temperature_lies_between_own_and_global(seed: int) -> None:
    truths: dict[str | None, tuple[float, int]] = {
        n: (1.5, 40 + 60 * i) for i, n in enumerate("abcde")
    }
    calibration = fit(sliced(truths, seed))
    for one in calibration.slices:
        if one.own is None:
            assert (one.temperature, one.share) == (calibration.temperature, 0)
            continue
        low, high = sorted((one.own.temperature, calibration.temperature))
        assert low * (1 - 1e-12) <= one.temperature <= high * (1 + 1e-12)
        assert 0 <= one.share < 1


def test_equal_truths_shrink_far_and_the_fewest_judgments_the_furthest() -> None:
    truths: dict[str | None, tuple[float, int]] = {
        n: (1.5, 80 * 2**i) for i, n in enumerate("abcdef")
    }
    errors = {"own": 0.0, "shrunk": 0.0}
    for seed in range(20):
        slices = fit(sliced(truths, seed)).slices
        shares = [one.share for one in slices if one.own is not None]
        assert shares[0] <= shares[-1]
        for one in slices:
            assert one.own is not None
            errors["own"] += abs(np.log(one.own.temperature / 1.5))
            errors["shrunk"] += abs(np.log(one.temperature / 1.5))
    assert errors["shrunk"] < 0.6 * errors["own"]


def test_one_slice_is_the_global_one() -> None:
    calibration = fit(sliced({"a": (1.5, 500)}))
    (one,) = calibration.slices
    assert one.own is not None
    assert one.temperature == calibration.temperature == one.own.temperature


def test_a_slice_that_is_refused_takes_the_global_one_and_says_why() -> None:
    pairs = sliced({"many": (1.5, 500), "few": (1.5, 15), "other": (1.0, 500), None: (1.0, 99)})
    certain = sliced({"certain": (1e-9, 60)})
    both = ScoredPairs(
        *(
            np.concatenate([getattr(pairs, name), getattr(certain, name)])
            for name in ("first", "second", "targets", "weights", "groups")
        ),
        pairs.subsets + certain.subsets,
    )
    calibration = fit(both)
    found = {one.name: one for one in calibration.slices}
    assert set(found) == {"many", "few", "other", "certain"}
    for name, why in (("few", "8 prompts"), ("certain", "agree with their margins")):
        assert found[name].own is None
        assert found[name].temperature == calibration.temperature
        assert why in found[name].refusal


def test_a_probability_takes_its_slices_temperature() -> None:
    calibration = fit(sliced({"a": (0.5, 3000), "b": (3.0, 3000)}))
    x = np.full(4, 1.2)
    p = calibration.probability(x, subsets=["a", "b", None, "unheard of"])
    a, b = (calibration.temperature_of(name) for name in "ab")
    assert a < calibration.temperature < b
    np.testing.assert_array_equal(
        p, expit(x / np.array([a, b, calibration.temperature, calibration.temperature]))
    )
    np.testing.assert_array_equal(calibration.probability(x), expit(x / calibration.temperature))
    with pytest.raises(OptionError, match="1 subsets"):
        calibration.probability(x, subsets=["a"])


def test_slices_go_through_json_and_pairs_through_their_arrays() -> None:
    pairs = sliced({"a": (0.5, 300), None: (1.0, 100), "b": (3.0, 300), "few": (1.0, 4)})
    calibration = fit(pairs)
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration
    again = ScoredPairs.from_arrays(pairs.arrays(), pairs.subset_names)
    assert again.subsets == pairs.subsets
    assert pairs.take(np.array([0, 350, 400])).subsets == ("a", None, "b")
    old = {k: v for k, v in pairs.arrays().items() if k != "subsets"}
    assert ScoredPairs.from_arrays(old, ()).subsets == (None,) * len(pairs)


def test_slices_need_subsets_and_a_temperature() -> None:
    with pytest.raises(OptionError, match="subset"):
        fit(sliced({None: (1.0, 300)}))
    with pytest.raises(OptionError, match="only, not 'power'"):
        fit_calibration(sliced({"a": (1.0, 300)}), mean(), slices=True, method="power")


def test_the_variance_between_slices_is_dersimonian_and_lairds() -> None:
    """A worked example by hand; equal errors reduce it to the variance less the error's."""
    x, se = [0.1, 0.5, 0.9], [0.2, 0.2, 0.2]
    assert between_variance(x, se) == pytest.approx(np.var(x, ddof=1) - 0.04)
    assert between_variance([0.1, 0.12], [0.2, 0.3]) == 0
    assert between_variance([3.0], [0.1]) == 0
    rng = np.random.default_rng(0)
    errors = rng.uniform(0.1, 0.4, 4000)
    drawn = rng.normal(0, 0.5, 4000) + rng.normal(0, errors)
    assert between_variance(drawn.tolist(), errors.tolist()) == pytest.approx(0.25, rel=0.1)
