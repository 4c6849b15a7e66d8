"""Older judgments to fit on, the newest to gate on; no prompt on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.errors import OptionError, TooFewJudgmentsError
from ensemble_rm.evidence.dated_margins import Ints


@dataclass(frozen=True, eq=False)
class TimeSplit:
    """Rows of the two parts.

    Attributes
    ----------
    fit, gate : ndarray of int
        Rows judged before the cut, and at or after it.
    cut : float
        When the newest part begins, seconds.
    left_out : int
        Judgments of prompts that were judged on both sides, on the side that they do not go to.
    """

    fit: NDArray[np.int64]
    gate: NDArray[np.int64]
    cut: float
    left_out: int


def split_by_time(groups: Ints, times: Floats, *, share: float) -> TimeSplit:
    """Cut judgments at a time, and part the prompts that were judged on both sides of it.

    A prompt judged on one side goes there. One judged on both goes to a side by a bit of its own
    name, always the same, and its judgments on the other side are left out: so a fixed set of
    prompts that is judged again each month still leaves both parts their half.

    Parameters
    ----------
    groups : ndarray of int, shape (n_judgments,)
        Name of each judgment's prompt.
    times : ndarray, shape (n_judgments,)
        When each was judged, seconds.
    share : float
        Of the judgments, at least, that are the newest part; in (0, 1). Judgments of one moment
        are not parted.

    Returns
    -------
    TimeSplit

    Raises
    ------
    TooFewJudgmentsError
        If a part would be empty: all were judged at one moment, or there are none.
    """
    if not 0 < share < 1:
        raise OptionError(f"the gate's share must lie in (0, 1), not {share}")
    n = len(times)
    if n < 2:
        raise TooFewJudgmentsError(f"{n} judgments cannot be split by time; collect more")
    cut = float(np.partition(times, n - max(1, round(share * n)))[n - max(1, round(share * n))])
    newer = times >= cut
    names, labels = np.unique(groups, return_inverse=True)
    on_new = np.bincount(labels, newer, len(names)) > 0
    on_old = np.bincount(labels, ~newer, len(names)) > 0
    to_gate = on_new & (~on_old | _bit(names))
    gate = newer & to_gate[labels]
    fit = ~newer & ~to_gate[labels]
    if not fit.any() or not gate.any():
        raise TooFewJudgmentsError(
            f"{n} judgments leave {int(fit.sum())} before and {int(gate.sum())} after the cut in "
            "time that fit and gate need; collect more, at more times or on more prompts"
        )
    return TimeSplit(
        np.flatnonzero(fit), np.flatnonzero(gate), cut, n - int(fit.sum() + gate.sum())
    )


def _bit(names: Ints) -> NDArray[np.bool_]:
    """Return a fair bit of each name: the last step of Steele et al.'s (2014) SplitMix64."""
    x = names.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((x >> np.uint64(63)) == 1)
