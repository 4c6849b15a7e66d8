"""How many scorers' models are in memory at once, where not all of them fit.

Knows who holds a model and who uses it; knows neither samples nor scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Condition

from ensemble_rm.errors import OptionError
from ensemble_rm.members.scorer import Scorer


class ModelPool:
    """Keeps the models of at most `max_loaded` scorers in memory.

    Ensembles that were made from one another share it, between threads too: who finds no room
    waits until a model is idle. Scorers that load no model are let through.

    Parameters
    ----------
    max_loaded : int
        Scorers that may hold their models at the same time.

    Raises
    ------
    OptionError
        If there is no room for one.
    """

    def __init__(self, max_loaded: int) -> None:
        if max_loaded < 1:
            raise OptionError(f"max_loaded_models must be at least 1, not {max_loaded}")
        self.max_loaded = max_loaded
        self._held: dict[int, Scorer] = {}  # by id, the one idle for longest first
        self._users: dict[int, int] = {}
        self._changed = Condition()

    def loaded_first(self, scorers: Sequence[Scorer]) -> list[Scorer]:
        """Return the scorers in the order that loads least: those in memory before the others."""
        with self._changed:
            return sorted(scorers, key=lambda scorer: id(scorer) not in self._held)

    @contextmanager
    def using(self, scorer: Scorer) -> Iterator[None]:
        """Let a scorer hold its model inside; what is idle is unloaded where room is needed."""
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
        """Unload the model that was idle for longest, if it must be; False if all are in use."""
        if len(self._held) < self.max_loaded:
            return True
        idle = next((key for key in self._held if not self._users[key]), None)
        if idle is None:
            return False
        del self._users[idle]
        self._held.pop(idle).unload()
        return True
