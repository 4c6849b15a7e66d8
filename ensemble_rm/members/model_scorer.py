"""What members over a model in this process have in common: loaded late, used in turn, let go.

Knows no kind of member, and not what the model is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from threading import RLock
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.members import backbone as bb
from ensemble_rm.members.text import Truncation
from ensemble_rm.members.trunk import Progress, TrunkOptions, silent
from ensemble_rm.samples import Sample

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="ModelScorer")


def in_turn(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Let one thread at a time into a scorer's methods: its model and tokenizer keep state."""

    @wraps(method)
    def alone(self: S, /, *args: P.args, **options: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **options)

    return alone


class ModelScorer(ABC):
    """A scorer that loads a model at its first score; a kind adds `score_counted`.

    Parameters
    ----------
    backbone : Backbone
    options : TrunkOptions
    names : sequence of str
        One a column.
    """

    kind: str

    def __init__(self, backbone: bb.Backbone, options: TrunkOptions, names: Sequence[str]) -> None:
        self.backbone, self.options, self.names = backbone, options, tuple(names)
        self._lock = RLock()

    def score(self, samples: Sequence[Sample]) -> NDArray[np.float64]:
        """Return (n_samples, n_members) raw scores, in the order of the samples."""
        return self.score_counted(samples)[0]

    @abstractmethod
    def score_counted(
        self, samples: Sequence[Sample], *, progress: Progress = silent
    ) -> tuple[NDArray[np.float64], Truncation]:
        """Return the scores, and how many samples were cut."""

    @in_turn
    def unload(self) -> None:
        """Let the model go until the next score."""
        self._forget()
        bb.empty_cache(bb.pick_device(self.options.device))

    @abstractmethod
    def _forget(self) -> None:
        """Keep no reference to the model."""
