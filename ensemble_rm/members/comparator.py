"""The interface of comparators, such as an ensemble or a judge model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.data.samples import Prompt


class Compared(Protocol):
    """A comparator's verdicts on pairs, in their order."""

    @property
    def probability(self) -> NDArray[np.float64]:
        """P(first is preferred), shape (n_pairs,); NaN where there is no verdict."""
        ...


class Comparator(Protocol):
    """Compares pairs of completions, as `RewardEnsemble` and `JudgeComparator` do.

    A comparator is symmetric: p(a, b) + p(b, a) = 1.
    """

    def compare(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> Compared:
        """Return the probability that a human prefers each first completion.

        Parameters
        ----------
        prompts : sequence of str or of messages
            One per pair.
        first, second : sequence of str
            The completions.

        Returns
        -------
        Compared
        """
        ...
