"""Dated judgments as recalibration sees them: margins, verdicts, prompts and times, in arrays.

Knows numbers; knows nothing of texts, databases, models or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import OptionError

DAY = 86400.0

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DatedMargins:
    """Judgments, one a row, with the margin of the pair that was judged.

    Attributes
    ----------
    margins : ndarray, shape (n_judgments,)
        Aggregated reward of the first side minus that of the second, in normalised units.
    member_margins : ndarray, shape (n_judgments, n_members)
        The same of each member.
    targets : ndarray, shape (n_judgments,)
        1 where the first side was preferred, 0 where the second, ½ for a tie.
    weights : ndarray, shape (n_judgments,)
        How much each counts, > 0.
    groups : ndarray of int, shape (n_judgments,)
        A name of the prompt.
    times : ndarray, shape (n_judgments,)
        When it was judged, seconds.
    subsets : ndarray of int, shape (n_judgments,)
        Place in `subset_names`; −1 where none is named.
    subset_names : tuple of str
        Sorted.
    """

    margins: Floats
    member_margins: NDArray[Any]
    targets: Floats
    weights: Floats
    groups: Ints
    times: Floats
    subsets: NDArray[np.int32]
    subset_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.margins)
        for field in fields(self):
            if field.name != "subset_names" and len(getattr(self, field.name)) != n:
                found = len(getattr(self, field.name))
                raise OptionError(f"{found} {field.name} for {n} margins")

    def __len__(self) -> int:
        return len(self.margins)

    def take(self, rows: NDArray[Any]) -> DatedMargins:
        """Return some of the judgments."""
        chosen = {
            f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "subset_names"
        }
        return DatedMargins(**chosen, subset_names=self.subset_names)

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(np.unique(self.groups))


def joined(parts: Sequence[DatedMargins]) -> DatedMargins:
    """Return the judgments of all parts, whose subsets have the same names."""
    names = [f.name for f in fields(DatedMargins) if f.name != "subset_names"]
    found = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return DatedMargins(**found, subset_names=parts[0].subset_names)


def forgetting(times: Floats, *, half_life: float | None) -> Floats:
    """Return 2^(−age/half_life), age counted back from the newest judgment, in seconds.

    The newest judgment and not the clock: the same judgments weigh the same whenever the job runs.

    Parameters
    ----------
    times : ndarray, shape (n_judgments,)
        Seconds.
    half_life : float, optional
        Seconds, > 0; where there is none, nothing is forgotten.

    Returns
    -------
    ndarray, shape (n_judgments,)
    """
    if half_life is None or not len(times):
        return np.ones(len(times))
    if not half_life > 0:
        raise OptionError(f"half_life must be > 0, not {half_life}")
    return np.asarray(np.exp2(np.maximum((times - times.max()) / half_life, -500.0)))
