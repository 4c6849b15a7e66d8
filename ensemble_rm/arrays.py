"""Arrays of floats: the type, means over what is present, and numbers in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]


def mean_of_present(values: Floats, *, fewest: int = 1) -> Floats:
    """Return each row's mean over the values that are not NaN, shape (n,).

    Parameters
    ----------
    values : ndarray, shape (n, k)
    fewest : int
        A row with fewer values gets NaN.
    """
    present = ~np.isnan(values)
    # The common case needs no masks.
    if present.all() and values.shape[1] >= fewest:
        return np.asarray(values.mean(axis=1))
    counts = present.sum(axis=1)
    # Not nanmean: it warns of empty rows.
    sums = np.where(present, values, 0.0).sum(axis=1)
    return np.where(counts >= fewest, sums / np.maximum(counts, 1), np.nan)


def finite_or_none(value: Any) -> Any:
    """Return JSON-ready data: numbers as int or float, and null for NaN and infinity.

    JSON has neither NaN nor infinity: Python writes them as bare words that other readers refuse.

    Parameters
    ----------
    value : float, array, or mapping or sequence of such
        Arrays become lists; strings, booleans, integers and None stay as they are.
    """
    if isinstance(value, np.ndarray | np.generic):
        return finite_or_none(value.tolist())
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
