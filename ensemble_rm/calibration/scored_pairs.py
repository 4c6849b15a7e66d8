"""Judged pairs as calibration and evaluation read them: normalised scores and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.errors import OptionError


@dataclass(frozen=True, eq=False)
class ScoredPairs:
    """Judged pairs, scored by every member.

    Attributes
    ----------
    first, second : ndarray, shape (n_pairs, n_members)
        Normalised member scores of the two sides.
    targets, weights : ndarray, shape (n_pairs,)
        P(first is preferred) by the judgment, and its weight.
    groups : ndarray of int, shape (n_pairs,)
        Prompt of each pair.
    subsets : tuple of (str or None)
        Slice of each pair (default: none).
    ties : ndarray, shape (n_pairs,)
        Share of each verdict that is a tie, half of which is in the target (default: 0).
    distances : ndarray, shape (n_pairs, 2) or (n_pairs, 0)
        Distances of both sides to the training features, where the ensemble has a feature space.
    """

    first: Floats
    second: Floats
    targets: Floats
    weights: Floats
    groups: NDArray[np.int64]
    subsets: tuple[str | None, ...] = ()
    ties: Floats = field(default_factory=lambda: np.zeros(0))
    distances: Floats = field(default_factory=lambda: np.zeros((0, 0)))

    def __post_init__(self) -> None:
        n = len(self.targets)
        # Older files have no ties and no distances; zeros mean "none".
        object.__setattr__(self, "ties", self.ties if len(self.ties) else np.zeros(n))
        object.__setattr__(self, "subsets", tuple(self.subsets) or (None,) * n)
        if not len(self.distances):
            object.__setattr__(self, "distances", np.zeros((n, 0)))
        for name in ("first", "second", "weights", "groups", "subsets", "ties", "distances"):
            if len(getattr(self, name)) != n:
                raise OptionError(f"{len(getattr(self, name))} {name} for {n} targets")
        if self.first.shape != self.second.shape or self.first.ndim != 2:
            raise OptionError(
                f"scores must be two (n_pairs, n_members) matrices, not {self.first.shape} and "
                f"{self.second.shape}"
            )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def members(self) -> int:
        """Number of members."""
        return int(self.first.shape[1])

    @property
    def member_margins(self) -> Floats:
        """Score of the first side minus that of the second, shape (n_pairs, n_members)."""
        return self.first - self.second

    @property
    def subset_names(self) -> tuple[str, ...]:
        """Names of all subsets, sorted."""
        return tuple(sorted({name for name in self.subsets if name is not None}))

    def margins(self, aggregator: Aggregator) -> Floats:
        """Return the aggregated reward of the first minus the second side, shape (n_pairs,).

        NaN where too few members scored a side; see `Aggregator.where_enough`.
        """
        # NaN where too few members scored a side, which `rewarded` drops.
        return aggregator.where_enough(self.first) - aggregator.where_enough(self.second)

    def rewarded(self, aggregator: Aggregator) -> ScoredPairs:
        """Return the pairs whose sides both have a reward."""
        if aggregator.nan == "raise":  # every pair has one, or `margins` raises
            return self
        rewarded = ~np.isnan(self.margins(aggregator))
        return self if rewarded.all() else self.take(np.flatnonzero(rewarded))

    def take(self, rows: NDArray[np.int64]) -> ScoredPairs:
        """Return some of the pairs."""
        # Through `arrays`: every field is cut by the same rows, also ones added later.
        chosen = {name: array[rows] for name, array in self.arrays().items()}
        return ScoredPairs.from_arrays(chosen, self.subset_names)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays by name, as stored: subsets as indices into `subset_names`."""
        code_of: dict[str | None, int] = {name: i for i, name in enumerate(self.subset_names)}
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        # −1 is the code of None.
        codes = [code_of.get(name, -1) for name in self.subsets]
        return arrays | {"subsets": np.array(codes, dtype=np.int64)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], names: Sequence[str]) -> ScoredPairs:
        """Read what `arrays` returned, given the names of the subsets."""
        codes = arrays.get("subsets", ())
        subsets = tuple(None if code < 0 else names[code] for code in codes)
        return cls(**{**arrays, "subsets": subsets})
