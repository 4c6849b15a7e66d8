"""Judgments → what a prompt pays to a bet against a temperature.

Knows margins and verdicts; knows nothing of bets, lives or alarms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.errors import NonFiniteScoreError, OptionError

REACH = 4.0  # temperatures: beyond it a margin's verdict is certain in any case


def prompt_digest(prompt: str | int) -> str:
    """Return 16 hexadecimal digits that name a prompt."""
    return hashlib.sha256(str(prompt).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class JudgedRows:
    """Judgments seen from the side of the higher reward.

    Attributes
    ----------
    sizes : ndarray, shape (n_pairs,)
        Of the margins, ≥ 0.
    verdicts : ndarray, shape (n_pairs,)
        For that side, in [0, 1].
    keys : tuple of str
        Digest of each prompt.
    counts, inclusion : ndarray, shape (n_pairs,)
        Votes behind each verdict, and probability with which the pair was selected.
    """

    sizes: Floats
    verdicts: Floats
    keys: tuple[str, ...]
    counts: Floats
    inclusion: Floats

    @classmethod
    def read(
        cls,
        margins: ArrayLike,
        targets: ArrayLike,
        prompts: Sequence[str | int] | NDArray[np.int64],
        counts: ArrayLike | None,
        inclusion: ArrayLike | None,
    ) -> JudgedRows:
        """Check judgments and turn them; see `DriftTest.update`."""
        x = np.asarray(margins, dtype=np.float64)
        y = np.asarray(targets, dtype=np.float64)
        c = np.ones(x.shape) if counts is None else np.asarray(counts, dtype=np.float64)
        pi = np.ones(x.shape) if inclusion is None else np.asarray(inclusion, dtype=np.float64)
        shapes = {x.shape, y.shape, c.shape, pi.shape, (len(prompts),)}
        if len(shapes) > 1:
            raise OptionError(f"margins, targets, prompts and weights differ in shape: {shapes}")
        if not np.isfinite(x).all():
            raise NonFiniteScoreError("a margin is NaN or infinite; drop that pair, or score anew")
        if not ((y >= 0) & (y <= 1)).all():
            raise OptionError("targets must lie in [0, 1]")
        if not ((c > 0) & np.isfinite(c)).all():
            raise OptionError("counts must be finite and > 0")
        if not ((pi > 0) & (pi <= 1)).all():
            raise OptionError("inclusion probabilities must lie in (0, 1]")
        keys = tuple(prompt_digest(p) for p in prompts)
        return cls(np.abs(x), np.where(x >= 0, y, 1 - y), keys, c, pi)

    def take(self, chosen: NDArray[np.bool_]) -> JudgedRows:
        """Return some of the rows."""
        keys = tuple(key for key, one in zip(self.keys, chosen, strict=True) if one)
        arrays = (self.sizes, self.verdicts, self.counts, self.inclusion)
        a, v, c, pi = (array[chosen] for array in arrays)
        return JudgedRows(a, v, keys, c, pi)

    def payoffs(self, edge: float, min_inclusion: float, *, over: bool) -> Floats:
        """Return one payoff a prompt, in the order of their first judgments."""
        u = self.sizes / edge
        p = np.asarray(expit(u))
        z = u * (p - self.verdicts) if over else np.minimum(u, REACH) * (self.verdicts - p)
        number: dict[str, int] = {}
        place = np.array([number.setdefault(key, len(number)) for key in self.keys])
        paid = np.bincount(place, self.counts * z * (min_inclusion / self.inclusion))
        return np.asarray(paid / np.bincount(place, self.counts), dtype=np.float64)
