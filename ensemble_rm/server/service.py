"""The reward server without HTTP: holder, batcher, scoring thread, limits and figures together.

Knows samples and outcomes; knows nothing of requests, wire formats or sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.calibration import require_calibration
from ensemble_rm.data.samples import Sample
from ensemble_rm.ensemble.results import Comparison, compare_scored
from ensemble_rm.errors import NonFiniteScoreError, NotReadyError, TooLargeError
from ensemble_rm.server.holder import Held, Holder
from ensemble_rm.server.http.limits import check_samples, estimate_tokens
from ensemble_rm.server.metrics import Metrics
from ensemble_rm.server.options import ServerOptions
from ensemble_rm.server.scheduling.batching import Batcher
from ensemble_rm.server.scheduling.outcomes import Outcome, SampleError, Scored, first_error
from ensemble_rm.server.scheduling.worker import ScoringThread

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

_log = logging.getLogger(__name__)


class RewardService:
    """Scores what requests bring, in common batches.

    Parameters
    ----------
    load : callable
        Returns the ensemble.
    options : ServerOptions
    """

    def __init__(self, load: Callable[[], RewardEnsemble], options: ServerOptions) -> None:
        self.options, self.metrics = options, Metrics()
        self.worker = ScoringThread()
        self.holder = Holder(load)
        self.batcher: Batcher[Held, Sample, Outcome] = Batcher(
            self.worker,
            group=lambda sample: sample.prompt,
            cost=estimate_tokens,
            options=options.batching,
            on_batch=self.metrics.batch,
        )
        self.draining = False
        self._follow()

    def _follow(self) -> None:
        queue, counts = self.batcher.queue, self.batcher.counts
        follow = self.metrics.follow
        follow("ready", "1 where requests are served.", lambda: float(self.ready))
        follow("queue_samples", "That wait.", lambda: queue.samples)
        follow("queue_tokens", "Of the samples that wait, as estimated.", lambda: queue.tokens)
        follow("samples", "Scored.", lambda: counts.samples, grows=True)
        follow("batches", "Scored.", lambda: counts.batches, grows=True)
        follow("dropped_requests", "Given up by clients.", lambda: counts.dropped, grows=True)
        follow("refused_requests", "For a full queue.", lambda: counts.refused, grows=True)
        follow("scoring_seconds", "Of the scoring thread.", lambda: self.worker.seconds, grows=True)

    # Life ------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests are served: loaded, warmed up, and not shutting down."""
        return self.holder.loaded and self.batcher.serving and not self.draining

    async def load(self) -> None:
        """Load the ensemble and begin to score."""
        held = await self.holder.load()
        self.options.raw_text.check(held.ensemble.names)
        self.metrics.serve(held.version)
        self.batcher.start()
        _log.info("version %s serves", held.version)

    async def refresh(self) -> tuple[Held, bool]:
        """Serve the version that is current now; say whether it is another than before.

        Raises
        ------
        NotReadyError
            If none serves yet, or the server shuts down.
        StorageError
            If the current version cannot be read; the old one goes on.
        """
        if self.draining:
            raise NotReadyError("the server shuts down")
        held, changed = await self.holder.refresh()
        if changed:
            self.metrics.serve(held.version)
            _log.info("version %s serves", held.version)
        return held, changed

    async def close(self) -> None:
        """Finish what was accepted, and let the threads end."""
        self.draining = True
        await self.batcher.close()
        self.worker.close()
        self.holder.close()

    @property
    def busy(self) -> bool:
        """Whether a thread scores or loads."""
        return self.worker.busy or self.holder.busy

    def abandon(self) -> None:
        """Refuse what was accepted and is not answered yet, whatever the scoring thread does."""
        self.draining = True
        self.batcher.abandon()

    # Scoring ---------------------------------------------------------------------------------

    @property
    def current(self) -> Held:
        """What serves now; a named error where nothing does yet."""
        return self.holder.current

    async def outcomes(self, held: Held, samples: Sequence[Sample]) -> list[Outcome]:
        """Return what a version says of samples, each failure in its place.

        Raises
        ------
        RequestError
            If they are over a limit, or the queue is full.
        """
        check_samples(samples, self.options.limits)
        found = await self.batcher.submit(held, samples)
        for i, outcome in enumerate(found):
            if isinstance(outcome, Exception):
                self.metrics.failed.labels(type(outcome).__name__).inc()
                continue
            for member in np.flatnonzero(np.isnan(outcome.raw)):
                self.metrics.missing.labels(held.ensemble.names[member]).inc()
            if outcome.prompt_cut or outcome.completion_cut:
                self.metrics.truncated.inc()
                if self.options.on_truncation == "refuse":
                    found[i] = TooLargeError("a sample is longer than a member reads")
        return found

    async def scores(self, held: Held, samples: Sequence[Sample]) -> list[Scored]:
        """Return the samples' scores.

        Raises
        ------
        SampleError
            If one of them has none.
        """
        found = await self.outcomes(held, samples)
        failed = first_error(found)
        if failed is not None:
            raise SampleError(*failed)
        return [outcome for outcome in found if isinstance(outcome, Scored)]

    async def compare(
        self, held: Held, samples: Sequence[Sample], subsets: Sequence[str | None]
    ) -> Comparison:
        """Compare pairs: samples 2i and 2i + 1 are the sides of pair i.

        Raises
        ------
        NotCalibratedError, AggregatorMismatchError
            If there is no calibration, or it is of another aggregator.
        SampleError
            If a side has no score, or a margin is beyond a float.
        """
        calibration = require_calibration(held.ensemble.calibration, held.ensemble.aggregator)
        found = await self.scores(held, samples)
        reward, members = stack(found)
        _check_margins(reward, members)
        return compare_scored(calibration, reward, members, subsets=subsets)


def _check_margins(reward: Floats, members: Floats) -> None:
    """Raise `SampleError` for the first pair whose margin, or a member's, is beyond a float."""
    every = np.column_stack([reward, members])
    with np.errstate(over="ignore"):
        beyond = np.isinf(every[::2] - every[1::2]).any(axis=1)
    if beyond.any():
        cause = NonFiniteScoreError("the margin of a pair is beyond a float")
        raise SampleError(2 * int(np.argmax(beyond)), cause)


def stack(found: Sequence[Scored]) -> tuple[Floats, Floats]:
    """Return the rewards, (n_samples,), and the members' scores, (n_samples, n_members)."""
    reward = np.array([one.reward for one in found], dtype=np.float64)
    return reward, np.array([one.members for one in found], dtype=np.float64)
