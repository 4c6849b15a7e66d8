"""A draw of pairs with unequal probabilities, each of them known exactly.

The draw is systematic sampling [1]_ over prompts in random order, a prompt's pairs side by side: it
has a fixed size, and takes of a prompt at most the next whole number above the sum of its
probabilities, which is why a most per prompt leaves every π as it is. Probabilities are whole
multiples of 2⁻⁴⁰ that add up to the budget without rounding.

Knows utilities and prompt numbers; knows nothing of ensembles, text or files.

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

from ensemble_rm.errors import OptionError

UNIT = 1 << 40  # probabilities are counted in 1/UNIT
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Design:
    """How a draw is made; the same design draws again under another seed.

    Attributes
    ----------
    parts : ndarray of int, shape (n_pairs,)
        Inclusion probabilities in 2⁻⁴⁰; all > 0.
    groups : ndarray of int, shape (n_pairs,)
        Prompt of each pair, numbered from 0.
    strata : ndarray of int, shape (n_pairs,)
        Prompts of one stratum lie side by side: a draw takes of each its share, to within one.
    budget : int
        How many pairs a draw has.
    """

    parts: Ints
    groups: Ints
    strata: Ints
    budget: int

    @property
    def inclusion(self) -> Floats:
        """Probability of each pair to be drawn, shape (n_pairs,); they sum to the budget."""
        return self.parts / UNIT

    @property
    def floor(self) -> float:
        """The smallest of the probabilities, which `thin_to_equal` makes that of all."""
        return float(self.parts.min()) / UNIT

    def draw(self, *, seed: int) -> Ints:
        """Draw; return the pairs' positions, ascending, shape (budget,)."""
        rng = np.random.default_rng(seed)
        places = rng.permutation(int(self.groups.max()) + 1)  # each prompt's
        order = np.lexsort((rng.random(len(self.parts)), places[self.groups], self.strata))
        ends = np.cumsum(self.parts[order])
        points = int(rng.integers(UNIT)) + UNIT * np.arange(self.budget)
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
    """Find every pair's probability: mostly by its utility, and a share of it for all alike.

    π = (1 − s)·π_u + s·π_r [3]_. π_u grows with rank⁻ˢʰᵃʳᵖⁿᵉˢˢ, rank 1 the highest utility [2]_:
    no unit of the utility matters, and equals share their ranks. π_r is the same for all. Each
    adds up to the budget, is at most 1 a pair, and at most `max_per_prompt` a prompt; what a limit
    takes from some goes to the others in proportion.

    Parameters
    ----------
    utility : array_like, shape (n_pairs,), optional
        Finite; higher is asked sooner. All alike where not given.
    groups : array_like of int, shape (n_pairs,)
        Prompt of each pair.
    budget : int
        How many pairs to draw.
    random_share : float
        s in [0, 1]: the expected share of draws that no utility decides.
    max_per_prompt : int, optional
        Most pairs of one prompt; no limit where not given.
    sharpness : float
        ≥ 0; 0 is random, and beyond about 3 nearly the highest are taken.
    strata : array_like of int, shape (n_pairs,), optional
        One number a prompt, such as its subset's: drawn in proportion.

    Returns
    -------
    Design

    Raises
    ------
    OptionError
        If an option cannot be used, or the pool does not hold the budget.
    """
    labels = np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)
    n = len(labels)
    _check(n, budget, random_share, max_per_prompt, sharpness)
    sizes = np.bincount(labels) if n else np.zeros(0, dtype=np.int64)
    most = sizes if max_per_prompt is None else np.minimum(sizes, max_per_prompt)
    if budget > most.sum():
        limit = "" if max_per_prompt is None else f" at {max_per_prompt} a prompt at most"
        raise OptionError(
            f"the pool has {n} pairs of {len(sizes)} prompts, of which {most.sum()} can be drawn"
            f"{limit}; a budget of {budget} is more: lower it, raise the limit or add pairs"
        )
    level = np.zeros(n, dtype=np.int64) if strata is None else np.asarray(strata, dtype=np.int64)
    if level.shape != (n,) or (level != level[_firsts(labels)][labels]).any():
        raise OptionError("strata must be one number a pair, the same for all pairs of a prompt")
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
    """Where each prompt stands first."""
    return np.asarray(np.unique(labels, return_index=True)[1], dtype=np.int64)


def _tempered(utility: ArrayLike, n: int, sharpness: float) -> Floats:
    u = np.asarray(utility, dtype=np.float64)
    if u.shape != (n,) or not np.isfinite(u).all():
        raise OptionError(f"the utility must be {n} finite numbers, not an array of {u.shape}")
    return np.asarray(rankdata(-u) ** -sharpness, dtype=np.float64)


def _spread(mass: Floats, labels: Ints, most: Ints, budget: int) -> Floats:
    """Return probabilities in proportion to `mass` as far as 1 a pair and the prompts allow."""
    sums = np.asarray(np.bincount(labels, mass), dtype=np.float64)
    shares = fill(sums, most.astype(np.float64), float(budget))
    pi = (shares / sums)[labels] * mass
    # Pairs beyond 1 hand what they have too much to their prompt's others.
    for group, rows in _members(labels, np.unique(labels[pi > 1 + 1e-12])):
        pi[rows] = fill(mass[rows], np.ones(len(rows)), float(shares[group]))
    return np.minimum(pi, 1.0)


def _members(labels: Ints, groups: Ints) -> Iterator[tuple[int, Ints]]:
    """Give the rows of each of the groups."""
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels))
    for group in groups.tolist():
        begin = int(ends[group - 1]) if group else 0
        yield group, order[begin : ends[group]]


def fill(mass: Floats, caps: Floats, total: float) -> Floats:
    """Return min(caps, λ·mass), λ such that they sum to `total` ≤ Σ caps."""
    if total >= caps.sum():
        return caps.copy()
    ratio = caps / mass
    order = np.argsort(ratio, kind="stable")
    full = np.concatenate([[0.0], np.cumsum(caps[order])[:-1]])  # of those before each
    rest = np.cumsum(mass[order][::-1])[::-1]
    level = (total - full) / rest
    first = int(np.argmax(level <= ratio[order]))
    return np.asarray(np.minimum(caps, level[first] * mass), dtype=np.float64)


def _whole(pi: Floats, labels: Ints, most: Ints, budget: int) -> Ints:
    """Round probabilities to whole parts of `UNIT` that keep every sum and limit exactly."""
    sizes = np.bincount(labels)
    sums = np.asarray(np.bincount(labels, pi) * UNIT, dtype=np.float64)
    totals = apportion(sums, budget * UNIT, sizes, most * UNIT)
    parts = totals[labels]
    for group, rows in _members(labels, np.flatnonzero(sizes > 1)):
        ones = np.ones(len(rows), dtype=np.int64)
        parts[rows] = apportion(pi[rows] * UNIT, int(totals[group]), ones, ones * UNIT)
    return parts


def apportion(shares: Floats, total: int, least: Ints, most: Ints) -> Ints:
    """Round shares to whole numbers within bounds that sum to `total`, by largest remainders."""
    found = np.clip(np.floor(shares).astype(np.int64), least, most)
    while (short := total - int(found.sum())) != 0:
        sign = 1 if short > 0 else -1
        free = np.flatnonzero(found < most if short > 0 else found > least)
        wanting = np.argsort(-sign * (shares[free] - found[free]), kind="stable")
        found[free[wanting[: abs(short)]]] += sign
    return found
