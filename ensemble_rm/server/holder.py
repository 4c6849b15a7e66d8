"""The ensemble that serves: loaded, warmed up, and put in another's place without a gap.

A request keeps the version under which it was accepted. Knows ensembles and threads; knows nothing
of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ensemble_rm.data.samples import Sample
from ensemble_rm.errors import NotReadyError
from ensemble_rm.rl.pinned import folder_digest, live_digest
from ensemble_rm.server.scheduling.threads import CallThread

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

_WARM = [Sample("How are you?", answer, "Well.") for answer in ("Fine, thank you.", "Fine.")]
_SHOWN = 12  # characters of a digest


@dataclass(frozen=True, eq=False)
class Held:
    """An ensemble and the name of its version, which every answer carries.

    Attributes
    ----------
    ensemble : RewardEnsemble
    version : str
        The number in its folder of versions; else what its provenance calls it; else the head of
        its digest.
    """

    ensemble: RewardEnsemble
    version: str


def name_version(ensemble: RewardEnsemble) -> str:
    """Return what answers call an ensemble's version."""
    origin = ensemble.origin
    if origin is not None and origin.version is not None:
        return str(origin.version)
    named = ensemble.provenance.get("version")
    if named is not None:
        return str(named)
    return (live_digest(ensemble) if origin is None else folder_digest(origin.folder))[:_SHOWN]


class Holder:
    """Holds the ensemble that serves.

    Parameters
    ----------
    load : callable
        Returns the ensemble; called once, in a thread.
    """

    def __init__(self, load: Callable[[], RewardEnsemble]) -> None:
        self._load = load
        self._held: Held | None = None
        self._changing = asyncio.Lock()
        self._thread = CallThread("loading")

    @property
    def loaded(self) -> bool:
        """Whether there is an ensemble that has scored once."""
        return self._held is not None

    @property
    def busy(self) -> bool:
        """Whether it loads."""
        return self._thread.busy

    def close(self) -> None:
        """Let the thread that loads end."""
        self._thread.close()

    @property
    def current(self) -> Held:
        """What serves now.

        Raises
        ------
        NotReadyError
            If nothing does yet.
        """
        if self._held is None:
            raise NotReadyError("the ensemble is being loaded")
        return self._held

    async def load(self) -> Held:
        """Load the ensemble, let it score once, and serve it."""
        async with self._changing:
            self._held = await self._thread.run(partial(self._warmed, self._load, None))
            return self._held

    async def refresh(self) -> tuple[Held, bool]:
        """Serve the version that is current now; say whether it is another than before.

        It is loaded and warmed up beside the old one, which serves meanwhile.
        """
        async with self._changing:
            old = self.current
            warmed = partial(self._warmed, old.ensemble.refresh, old)
            new = await self._thread.run(warmed)
            self._held = new
            return new, new is not old

    @staticmethod
    def _warmed(load: Callable[[], RewardEnsemble], old: Held | None) -> Held:
        ensemble = load()
        if old is not None and ensemble is old.ensemble:
            return old
        # Members that serve already score in the scoring thread alone.
        if old is None or ensemble.scorers is not old.ensemble.scorers:
            ensemble.score(_WARM)
        return Held(ensemble, name_version(ensemble))
