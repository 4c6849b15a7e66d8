"""A limit on the models in memory at once, where not all of them fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

from ensemble_rm.errors import OptionError
from ensemble_rm.members.scorer import Scorer


class ModelPool:
    """Keeps the models of at most `max_loaded` scorers in memory.

    Ensembles that were made from one another share a pool, across threads, too: a thread that
    finds no room waits until a model is idle. Scorers without a model are not limited.

    Parameters
    ----------
    max_loaded : int
        Maximum number of scorers with a model in memory, >= 1.

    Raises
    ------
    OptionError
        If `max_loaded` is less than 1.
    """

    def __init__(self, max_loaded: int) -> None:
        if max_loaded < 1:
            raise OptionError(f"max_loaded_models must be at least 1, not {max_loaded}")
        self.max_loaded = max_loaded
        self._held: dict[int, Scorer] = {}  # by id, the longest idle first
        self._users: dict[int, int] = {}
        self._changed = Condition()

    def holds(self, scorer: Scorer) -> bool:
        """Return whether the scorer's model is in memory."""
        with self._changed:
            return id(scorer) in self._held

    @contextmanager
    def using(self, scorer: Scorer) -> Iterator[None]:
        """Reserve room for a scorer's model; an idle model is unloaded if there is none."""
        if not scorer.has_model:
            yield
            return
        key = id(scorer)
        with self._changed:
            self._changed.wait_for(lambda: key in self._held or self._make_room())
            self._held[key] = scorer
            self._users[key] = self._users.get(key, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._users[key] -= 1
                self._held[key] = self._held.pop(key)
                self._changed.notify_all()

    def _make_room(self) -> bool:
        """Unload the longest idle model if there is no room; return False if all are in use."""
        if len(self._held) < self.max_loaded:
            return True
        idle = next((key for key in self._held if not self._users[key]), None)
        if idle is None:
            return False
        del self._users[idle]
        self._held.pop(idle).unload()
        return True
