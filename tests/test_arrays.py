"""Numbers in JSON, and means over what is present."""

from __future__ import annotations

import json

import numpy as np

from ensemble_rm.arrays import finite_or_none, mean_of_present


def test_nan_and_infinity_become_null_at_any_depth() -> None:
    value = {
        "a": [1, 0.5, float("nan"), (float("inf"), "text")],
        "b": np.array([[1.0, np.nan], [-np.inf, 2.0]]),
        "c": {"d": np.float64("nan"), "e": np.int64(3), "f": None, "g": True},
        "h": np.float32(0.5),
    }
    expected = {
        "a": [1, 0.5, None, [None, "text"]],
        "b": [[1.0, None], [None, 2.0]],
        "c": {"d": None, "e": 3, "f": None, "g": True},
        "h": 0.5,
    }
    result = finite_or_none(value)
    assert result == expected
    assert json.loads(json.dumps(result, allow_nan=False)) == expected
    assert type(result["c"]["e"]) is int and type(result["h"]) is float


def test_the_mean_of_what_is_present() -> None:
    rows = np.array([[1.0, 3.0, np.nan], [np.nan, np.nan, 4.0], [np.nan] * 3])
    np.testing.assert_array_equal(mean_of_present(rows), [2.0, 4.0, np.nan])
    np.testing.assert_array_equal(mean_of_present(rows, fewest=2), [2.0, np.nan, np.nan])
    whole = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(mean_of_present(whole), whole.mean(axis=1))
    assert np.isnan(mean_of_present(whole, fewest=4)).all()
