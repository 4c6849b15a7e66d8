"""Concurrent calls from many threads, scored in common batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

from ensemble_rm.data.samples import Sample
from ensemble_rm.rl.pinned import PinnedEnsemble
from ensemble_rm.rl.scoring import LoopRewards, score_each


@dataclass
class _Ticket:
    samples: Sequence[Sample | Exception]
    rewards: LoopRewards | None = None
    error: BaseException | None = None
    done: bool = False


class ThreadBatcher:
    """Score samples from several threads, each with one or a few, in common batches.

    The first thread scores its own samples. Threads that call meanwhile wait; the next of them
    scores all waiting samples. No timer delays a call, and completions of one prompt share its
    forward pass.

    Parameters
    ----------
    pinned : PinnedEnsemble
    """

    def __init__(self, pinned: PinnedEnsemble) -> None:
        self.pinned = pinned
        self._waiting: list[_Ticket] = []
        self._gate = Lock()
        self._scoring = Lock()

    def __call__(self, samples: Sequence[Sample | Exception]) -> LoopRewards:
        """Return the samples' rewards; failures are in `LoopRewards.failed`."""
        ticket = _Ticket(samples)
        # The ticket is enqueued before the scoring lock is asked for, so that a batch in waiting
        # takes it.
        with self._gate:
            self._waiting.append(ticket)
        with self._scoring:
            # Another thread may have scored this ticket while this one waited for the lock.
            if not ticket.done:
                with self._gate:
                    # Everything that waits now is one batch; later tickets form the next.
                    batch, self._waiting = self._waiting, []
                self._serve(batch)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.rewards is not None
        return ticket.rewards

    def _serve(self, batch: list[_Ticket]) -> None:
        try:
            samples = [sample for ticket in batch for sample in ticket.samples]
            rewards = score_each(self.pinned.ensemble, samples)
        # BaseException: a thread that waits for this ticket must not wait for ever.
        except BaseException as error:
            for ticket in batch:
                ticket.error, ticket.done = error, True
            # The thread that scored gets the error itself as well, also a KeyboardInterrupt.
            raise
        start = 0
        for ticket in batch:
            stop = start + len(ticket.samples)
            ticket.rewards, ticket.done = rewards[start:stop], True
            start = stop
