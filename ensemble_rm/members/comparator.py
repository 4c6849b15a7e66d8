"""The protocol of what judges pairs, with or without a score: an ensemble, a judge model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Prompt


class Compared(Protocol):
    """What a comparator says of pairs, in their order."""

    @property
    def probability(self) -> NDArray[np.float64]:
        """P(first is preferred), shape (n_pairs,); NaN where there is no judgment."""
        ...


@runtime_checkable
class Comparator(Protocol):
    """Judges pairs of completions; `RewardEnsemble` is one, and so is `JudgeComparator`.

    A comparator has no side: p(a, b) + p(b, a) = 1.
    """

    def compare(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> Compared:
        """Say with what probability a human prefers each first completion.

        Parameters
        ----------
        prompts : sequence of str or of messages
            One a pair.
        first, second : sequence of str
            The completions.

        Returns
        -------
        Compared
        """
        ...
