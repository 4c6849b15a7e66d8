"""The one thread that scores, so that the event loop never waits for a forward pass.

Knows threads and ensembles; knows nothing of HTTP or of queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from ensemble_rm.data.samples import Sample
from ensemble_rm.server.memory import Trimmer
from ensemble_rm.server.scheduling.outcomes import Outcome, score_outcomes
from ensemble_rm.server.scheduling.threads import CallThread

if TYPE_CHECKING:
    from ensemble_rm.server.holder import Held

_TRIM_SECONDS = 20.0


class ScoringThread:
    """Scores samples in a thread of its own, one call after the other."""

    def __init__(self) -> None:
        self._thread = CallThread("scoring")
        self._clock: tuple[float, float | None] = (0.0, None)  # spent; the running call's begin
        self._trim = Trimmer(_TRIM_SECONDS)

    @property
    def busy(self) -> bool:
        """Whether it scores."""
        return self._thread.busy

    @property
    def seconds(self) -> float:
        """Spent in scoring so far, in the call that runs, too."""
        spent, began = self._clock
        return spent + (0.0 if began is None else monotonic() - began)

    async def __call__(self, held: Held, samples: Sequence[Sample]) -> list[Outcome]:
        """Return one outcome a sample, in their order."""
        return await self._thread.run(partial(self._score, held, samples))

    def _score(self, held: Held, samples: Sequence[Sample]) -> list[Outcome]:
        spent, began = self._clock[0], monotonic()
        self._clock = spent, began
        try:
            return score_outcomes(held.ensemble, samples)
        finally:  # both at once: whoever reads it between them would see it fall
            self._clock = spent + monotonic() - began, None
            self._trim()

    def close(self) -> None:
        """Let the thread end, once it has scored what it scores."""
        self._thread.close()
