"""Figures of curves of gold against n: peaks, drops, and the share of a drop that is removed.

A drop is (peak − final) of the mean curve over the repeats. Intervals are 95 % of a bootstrap over
repeats that finds each peak again; where repeats are cells of a grid, such as prompts by seeds,
both sides of the grid are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval."""

    value: float
    low: float
    high: float


def drawn_shares(repeats: int, rng: np.random.Generator) -> np.ndarray:
    """Return each repeat's share of a bootstrap sample, (DRAWS, repeats)."""
    rows = rng.integers(repeats, size=(DRAWS, repeats))
    return np.stack([np.bincount(r, minlength=repeats) for r in rows]) / repeats


class Curves:
    """Gold at each n, one row a repeat, for each arm: the same repeats in each.

    `grid` says that the rows are the cells of a table, such as (prompts, seeds), row by row.
    """

    def __init__(
        self,
        gold: dict[str, np.ndarray],
        *,
        grid: tuple[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        self.gold = gold
        (self.repeats,) = {len(rows) for rows in gold.values()}
        first, second = grid or (self.repeats, 1)
        rng = np.random.default_rng(seed)
        sides = drawn_shares(first, rng), drawn_shares(second, rng)
        counts = (sides[0][:, :, None] * sides[1][:, None, :]).reshape(DRAWS, first * second)
        self._drawn = {arm: counts @ rows for arm, rows in gold.items()}  # (DRAWS, n_sizes)

    def _interval(self, statistic: object, *arms: str) -> Interval:
        assert callable(statistic)
        value = float(statistic(*[self.gold[arm].mean(axis=0)[None] for arm in arms])[0])
        drawn = statistic(*[self._drawn[arm] for arm in arms])
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        return Interval(value, float(low), float(high))

    def peak(self, arm: str) -> Interval:
        return self._interval(lambda c: c.max(axis=1), arm)

    def final(self, arm: str) -> Interval:
        return self._interval(lambda c: c[:, -1], arm)

    def at(self, arm: str, size: int) -> Interval:
        """Gold at the `size`-th n."""
        return self._interval(lambda c: c[:, size], arm)

    def gain_at(self, arm: str, reference: str, size: int) -> Interval:
        """Compare two arms' gold at the `size`-th n, paired."""
        return self._interval(lambda a, b: a[:, size] - b[:, size], arm, reference)

    def drop(self, arm: str) -> Interval:
        return self._interval(drop, arm)

    def peak_gain(self, arm: str, reference: str) -> Interval:
        """Peak of an arm less the reference's, paired."""
        return self._interval(lambda a, b: a.max(axis=1) - b.max(axis=1), arm, reference)

    def removed(self, arm: str, reference: str) -> Interval | None:
        """Share of the reference's drop that an arm removes; None if no drop is significant."""
        if self.drop(reference).low <= 0:
            return None
        return self._interval(lambda a, b: 1 - drop(a) / drop(b), arm, reference)


def drop(curves: np.ndarray) -> np.ndarray:
    return curves.max(axis=1) - curves[:, -1]
