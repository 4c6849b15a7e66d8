"""The formulas of the aggregators, over sorted rows with missing members last.

Knows arrays of floats alone; coefficients come in checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.errors import OneMemberError

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sorted:
    """Scores as every formula reads them.

    Each row is ascending with its missing members last: the order of the members then cannot
    change even the rounding.
    """

    values: Floats  # (n, k), 0 where a member is missing
    present: NDArray[np.bool_]  # (n, k)
    counts: NDArray[np.int64]  # (n,), ≥ 1

    def average(self, terms: Floats) -> Floats:
        """Mean over the members present of (n, k) terms."""
        total: Floats = np.where(self.present, terms, 0.0).sum(axis=1)
        return total / self.counts

    def lowest(self) -> Floats:
        """Return the lowest score of each row."""
        return self.at(np.zeros_like(self.counts))

    def at(self, ranks: NDArray[np.int64]) -> Floats:
        """Return the score of each row at its 0-based rank."""
        return self.values[np.arange(len(self.values)), ranks]


def mean_of_present(values: Floats, *, fewest: int = 1) -> Floats:
    """Mean of each row's numbers that are not NaN; NaN where there are fewer than so many."""
    there = ~np.isnan(values)
    if there.all() and values.shape[1] >= fewest:
        return np.asarray(values.mean(axis=1))
    counts = there.sum(axis=1)
    sums = np.where(there, values, 0.0).sum(axis=1)
    return np.where(counts >= fewest, sums / np.maximum(counts, 1), np.nan)


def _mean(rows: Sorted) -> Floats:
    # Rounding alone could leave the range of the members: [.1, .1, .1] has the mean .1 + 1 ulp.
    return np.clip(rows.average(rows.values), rows.lowest(), rows.at(rows.counts - 1))


def _minimum(rows: Sorted) -> Floats:
    return rows.lowest()


def _variance(rows: Sorted, name: str) -> Floats:
    """Return the population variance (ddof 0); a single member has none."""
    alone = np.flatnonzero(rows.counts < 2)
    if alone.size:
        raise OneMemberError(
            f"{name} needs the disagreement of at least 2 members, and row {alone[0]} has one "
            f"({alone.size} such rows of {len(rows.counts)}); use a coefficient of 0, or more "
            "members"
        )
    return rows.average((rows.values - _mean(rows)[:, None]) ** 2)


def _uwo(rows: Sorted, lam: float) -> Floats:
    if lam == 0:
        return _mean(rows)
    return _mean(rows) - lam * _variance(rows, "uwo")


def _lcb(rows: Sorted, kappa: float) -> Floats:
    if kappa == 0:
        return _mean(rows)
    return _mean(rows) - kappa * np.sqrt(_variance(rows, "lcb"))


def _entropic(rows: Sorted, beta: float) -> Floats:
    lowest = rows.lowest()
    above = np.where(rows.present, rows.values - lowest[:, None], 0.0)
    # log-sum-exp about the minimum; expm1 and log1p keep the digits that a large β would cost.
    soft: Floats = lowest - beta * np.log1p(rows.average(np.expm1(-above / beta)))
    return np.clip(soft, lowest, _mean(rows))


def _quantile(rows: Sorted, q: float) -> Floats:
    rank = (rows.counts - 1) * q
    below = np.floor(rank).astype(np.int64)
    above = np.minimum(below + 1, rows.counts - 1)
    share = rank - below
    low, high = rows.at(below), rows.at(above)
    between: Floats = np.clip(low + share * (high - low), low, high)
    return between


def _median(rows: Sorted) -> Floats:
    return _quantile(rows, 0.5)


def _cvar(rows: Sorted, alpha: float) -> Floats:
    size = alpha * rows.counts[:, None]  # members in the tail, not necessarily whole
    weights = np.clip(size - np.arange(rows.values.shape[1]), 0.0, 1.0)  # (n, k)
    weights = np.where(rows.present, weights, 0.0)
    # Divided first: a tail far below one member must not underflow.
    weights = weights / weights.sum(axis=1, keepdims=True)
    tail: Floats = (weights * rows.values).sum(axis=1)
    return np.clip(tail, rows.lowest(), _mean(rows))


Formula: TypeAlias = Callable[..., Floats]
FORMULAS: dict[str, tuple[Formula, tuple[str, ...]]] = {
    "mean": (_mean, ()),
    "minimum": (_minimum, ()),
    "uwo": (_uwo, ("lam",)),
    "lcb": (_lcb, ("kappa",)),
    "entropic": (_entropic, ("beta",)),
    "median": (_median, ()),
    "quantile": (_quantile, ("q",)),
    "cvar": (_cvar, ("alpha",)),
}
