"""Calls from many threads, scored together: what waits while one batch is scored is the next one.

Knows threads and samples; knows nothing of any trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from ensemble_rm.data.samples import Sample
from ensemble_rm.rl.pinned import PinnedEnsemble
from ensemble_rm.rl.scoring import LoopRewards, score_each


@dataclass
class _Ticket:
    samples: Sequence[Sample | Exception]
    rewards: LoopRewards | None = None
    error: BaseException | None = None
    done: bool = field(default=False)


class GatheredScores:
    """Score samples that several threads bring, one or few at a time, in common batches.

    The first thread scores what there is; those that come meanwhile wait, and the next of them
    scores all that has gathered. No timer delays anyone; completions of one prompt share its pass.

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
        """Return the samples' rewards; failures are the caller's.

        Parameters
        ----------
        samples : sequence of Sample or Exception
        """
        ticket = _Ticket(samples)
        with self._gate:
            self._waiting.append(ticket)
        with self._scoring:
            if not ticket.done:
                with self._gate:
                    batch, self._waiting = self._waiting, []
                self._serve(batch)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.rewards is not None
        return ticket.rewards

    def _serve(self, batch: list[_Ticket]) -> None:
        try:
            every = [sample for ticket in batch for sample in ticket.samples]
            rewards = score_each(self.pinned.ensemble, every)
        except BaseException as error:
            for ticket in batch:
                ticket.error, ticket.done = error, True
            raise
        ends = np.cumsum([len(ticket.samples) for ticket in batch])
        for ticket, end in zip(batch, ends, strict=True):
            rows = slice(int(end) - len(ticket.samples), int(end))
            ticket.rewards = LoopRewards(
                rewards.reward[rows],
                rewards.members[rows],
                rewards.reference_reward[rows],
                rewards.errors[rows],
            )
            ticket.done = True
