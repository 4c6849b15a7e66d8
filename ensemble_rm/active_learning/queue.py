"""`pairs_for_humans`: pairs that wait for a judgment, and a random share of the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.active_learning.selection import SelectedPair, SelectedPairs
from ensemble_rm.data.samples import Preference, Preferences


def pairs_for_humans(
    pairs: Preferences,
    names: list[str],
    waiting: NDArray[np.bool_],
    *,
    audit_share: float,
    seed: int,
    strategy: str,
) -> SelectedPairs:
    """Return the pairs for humans, each name once, with its probability of being among them.

    Parameters
    ----------
    pairs : Preferences
    names : list of str
        Of `pair_names`; rows of one name are one pair, which is drawn once and waits where any of
        them does.
    waiting : ndarray of bool, shape (n_pairs,)
        Rows that are among them for certain, π = 1.
    audit_share : float
        In [0, 1]: π of the others.
    seed : int
        Of the draws, and of the sides, which stand in random order.
    strategy : str
        The name that they bear.
    """
    audit, sides = np.random.default_rng(seed).random((2, len(pairs)))
    _, first, of = np.unique(names, return_index=True, return_inverse=True)
    waits = np.zeros(len(first), dtype=np.bool_)
    np.logical_or.at(waits, of, waiting)
    found = []
    for one in np.argsort(first).tolist():  # in the order of the pairs
        row = int(first[one])
        if waits[one] or audit[row] < audit_share:
            inclusion = 1.0 if waits[one] else audit_share
            swap = bool(sides[row] < 0.5)
            found.append(_selected(pairs[row], names[row], strategy, inclusion, swap=swap))
    floor = audit_share if audit_share > 0 and not waits.all() else 1.0
    repeated = len(pairs) - len(first)
    prompts = len(pairs.prompt_keys)
    return SelectedPairs(tuple(found), len(first), prompts, repeated, 0, floor, seed)


def _selected(
    pair: Preference, name: str, strategy: str, inclusion: float, *, swap: bool
) -> SelectedPair:
    first, second = (pair.rejected, pair.chosen) if swap else (pair.chosen, pair.rejected)
    return SelectedPair(pair.prompt, first, second, name, strategy, inclusion, pair.subset)
