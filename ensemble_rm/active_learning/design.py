"""Sampling design: draw pairs with unequal inclusion probabilities that are known exactly.

The draw is systematic sampling [1]_ over prompts in random order, with the pairs of a prompt next
to each other. It has a fixed size, and draws from a prompt at most the sum of its probabilities,
rounded up, so a maximum per prompt changes no probability. Probabilities are whole multiples of
2⁻⁴⁰ that sum to the budget without rounding.

References
----------
.. [1] Madow 1949; Tillé 2006, Sampling Algorithms, chapter 7: systematic sampling.
.. [2] Kirsch et al. 2023, arXiv 2106.12059: drawing in proportion to a power of the rank
   (soft-rank acquisition) instead of taking the highest.
.. [3] Hesterberg 1995: a defensive mixture with a share of uniform draws bounds the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import OptionError

UNIT = 1 << 40  # probabilities are whole multiples of 1/UNIT
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Design:
    """Inclusion probabilities and strata of a draw; each seed gives another draw.

    Attributes
    ----------
    parts : ndarray of int, shape (n_pairs,)
        Inclusion probabilities in units of 2⁻⁴⁰; all > 0.
    groups : ndarray of int, shape (n_pairs,)
        Prompt of each pair, numbered from 0.
    strata : ndarray of int, shape (n_pairs,)
        Stratum of each pair. A draw takes from each stratum its share, to within one pair.
    budget : int
        Number of pairs per draw.
    """

    parts: Ints
    groups: Ints
    strata: Ints
    budget: int

    @property
    def inclusion(self) -> Floats:
        """Inclusion probability of each pair, shape (n_pairs,); they sum to the budget."""
        return self.parts / UNIT

    @property
    def floor(self) -> float:
        """The smallest inclusion probability, which `thin_to_equal` gives to all pairs."""
        return float(self.parts.min()) / UNIT

    def draw(self, *, seed: int) -> Ints:
        """Draw pairs; return their positions in ascending order, shape (budget,)."""
        # Prompts in random order within strata: systematic sampling then spreads over the pool.
        rng = np.random.default_rng(seed)
        positions = rng.permutation(int(self.groups.max()) + 1)  # of the prompts
        # Pairs of a prompt lie next to each other, which keeps each prompt's limit exact.
        order = np.lexsort((rng.random(len(self.parts)), positions[self.groups], self.strata))
        ends = np.cumsum(self.parts[order])
        # One random start and steps of one whole unit: exactly `budget` points.
        points = int(rng.integers(UNIT)) + UNIT * np.arange(self.budget)
        # A pair is drawn when a point falls into its interval.
        return np.sort(order[np.searchsorted(ends, points, side="right")])


def plan_draw(
    utility: ArrayLike | None,
    groups: ArrayLike,
    *,
    budget: int,
    random_share: float = 0.3,
    max_per_prompt: int | None = 1,
    sharpness: float = 1.0,
    strata: ArrayLike | None = None,
) -> Design:
    """Compute inclusion probabilities from utilities, mixed with a uniform share.

    π = (1 − s)·π_u + s·π_r [3]_. π_u is proportional to rank⁻ˢʰᵃʳᵖⁿᵉˢˢ, rank 1 the highest utility
    [2]_, so the unit of the utility does not matter; equal utilities share their rank. π_r is the
    same for all. Both sum to the budget, with at most 1 per pair and `max_per_prompt` per prompt;
    what exceeds a limit goes to the other pairs in proportion.

    Parameters
    ----------
    utility : array_like, shape (n_pairs,), optional
        Finite; pairs of higher utility are drawn more often (default: all equal).
    groups : array_like of int, shape (n_pairs,)
        Prompt of each pair.
    budget : int
        Number of pairs to draw.
    random_share : float
        s in [0, 1], the expected share of draws that do not depend on the utility.
    max_per_prompt : int, optional
        Maximum number of pairs per prompt (None: no limit).
    sharpness : float
        ≥ 0; 0 draws uniformly, and above about 3 nearly only the highest utilities are drawn.
    strata : array_like of int, shape (n_pairs,), optional
        Stratum of each pair, the same for all pairs of a prompt; strata are drawn in proportion.

    Returns
    -------
    Design

    Raises
    ------
    OptionError
        If an option is out of range, or the budget exceeds the pool.
    """
    labels = np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)
    n = len(labels)
    _check(n, budget, random_share, max_per_prompt, sharpness)
    sizes = np.bincount(labels) if n else np.zeros(0, dtype=np.int64)
    # The most that a prompt can give: its pairs, or the limit.
    most = sizes if max_per_prompt is None else np.minimum(sizes, max_per_prompt)
    if budget > most.sum():
        limit = "" if max_per_prompt is None else f", at most {max_per_prompt} per prompt,"
        raise OptionError(
            f"budget {budget} exceeds the {most.sum()} pairs that can be drawn{limit} from the "
            f"pool's {n} pairs of {len(sizes)} prompts; lower it, raise the limit or add pairs"
        )
    level = np.zeros(n, dtype=np.int64) if strata is None else np.asarray(strata, dtype=np.int64)
    if level.shape != (n,) or (level != level[_firsts(labels)][labels]).any():
        raise OptionError("strata must be one number per pair, the same for all pairs of a prompt")
    # The uniform share gives every pair a positive probability, without which 1/π is undefined.
    pi = _spread(np.ones(n), labels, most, budget)
    if utility is not None:
        useful = _spread(_tempered(utility, n, sharpness), labels, most, budget)
        pi = (1 - random_share) * useful + random_share * pi
    return Design(_whole(pi, labels, most, budget), labels, level, budget)


def _check(
    n: int, budget: int, random_share: float, max_per_prompt: int | None, sharpness: float
) -> None:
    if n == 0 or not 1 <= budget <= n:
        raise OptionError(f"budget must lie between 1 and the pool's {n} pairs, not {budget}")
    if not 0 <= random_share <= 1:
        raise OptionError(f"random_share must lie in [0, 1], not {random_share!r}")
    if max_per_prompt is not None and max_per_prompt < 1:
        raise OptionError(f"max_per_prompt must be at least 1, not {max_per_prompt}")
    if not 0 <= sharpness <= 20:
        raise OptionError(f"sharpness must lie in [0, 20], not {sharpness!r}")


def _firsts(labels: Ints) -> Ints:
    """Return the first row of each prompt."""
    return np.asarray(np.unique(labels, return_index=True)[1], dtype=np.int64)


def _tempered(utility: ArrayLike, n: int, sharpness: float) -> Floats:
    u = np.asarray(utility, dtype=np.float64)
    if u.shape != (n,) or not np.isfinite(u).all():
        raise OptionError(f"utility must be {n} finite numbers, not an array of shape {u.shape}")
    # Ranks, not values: utilities of different strategies have no common unit.
    return np.asarray(rankdata(-u) ** -sharpness, dtype=np.float64)


def _spread(mass: Floats, labels: Ints, most: Ints, budget: int) -> Floats:
    """Return probabilities proportional to `mass`, up to 1 per pair and `most` per prompt."""
    sums = np.asarray(np.bincount(labels, mass), dtype=np.float64)
    shares = fill(sums, most.astype(np.float64), float(budget))
    pi = (shares / sums)[labels] * mass
    # What exceeds 1 goes to the other pairs of the prompt.
    # 1e-12: rounding is no excess.
    for group, rows in _members(labels, np.unique(labels[pi > 1 + 1e-12])):
        pi[rows] = fill(mass[rows], np.ones(len(rows)), float(shares[group]))
    return np.minimum(pi, 1.0)


def _members(labels: Ints, groups: Ints) -> Iterator[tuple[int, Ints]]:
    """Yield each of the groups with its rows."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels))
    for group in groups.tolist():
        begin = int(ends[group - 1]) if group else 0
        yield group, order[begin : ends[group]]


def fill(mass: Floats, caps: Floats, total: float) -> Floats:
    """Return min(caps, λ·mass), λ such that they sum to `total` ≤ Σ caps."""
    # Every cap is reached.
    if total >= caps.sum():
        return caps.copy()
    # Items fill up in the order of cap/mass, as λ grows.
    ratio = caps / mass
    order = np.argsort(ratio, kind="stable")
    full = np.concatenate([[0.0], np.cumsum(caps[order])[:-1]])  # caps of those before each
    rest = np.cumsum(mass[order][::-1])[::-1]
    # λ if the items before each are full; the first that stays below its own ratio is right.
    level = (total - full) / rest
    first = int(np.argmax(level <= ratio[order]))
    return np.asarray(np.minimum(caps, level[first] * mass), dtype=np.float64)


def _whole(pi: Floats, labels: Ints, most: Ints, budget: int) -> Ints:
    """Round probabilities to multiples of 1/UNIT that keep every sum and limit exactly."""
    sizes = np.bincount(labels)
    sums = np.asarray(np.bincount(labels, pi) * UNIT, dtype=np.float64)
    totals = apportion(sums, budget * UNIT, sizes, most * UNIT)
    # A prompt with one pair has its total; the others share theirs.
    parts = totals[labels]
    for group, rows in _members(labels, np.flatnonzero(sizes > 1)):
        ones = np.ones(len(rows), dtype=np.int64)
        parts[rows] = apportion(pi[rows] * UNIT, int(totals[group]), ones, ones * UNIT)
    return parts


def apportion(shares: Floats, total: int, least: Ints, most: Ints) -> Ints:
    """Round shares to whole numbers within bounds that sum to `total` (largest remainders)."""
    # At least `least`, so that no probability becomes 0 by rounding.
    counts = np.clip(np.floor(shares).astype(np.int64), least, most)
    # One unit at a time per item, largest remainder first; bounds may need several rounds.
    while (short := total - int(counts.sum())) != 0:
        sign = 1 if short > 0 else -1
        free = np.flatnonzero(counts < most if short > 0 else counts > least)
        ranked = np.argsort(-sign * (shares[free] - counts[free]), kind="stable")
        counts[free[ranked[: abs(short)]]] += sign
    return counts
