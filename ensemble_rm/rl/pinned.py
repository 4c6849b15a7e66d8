"""One version of an ensemble for the whole of a run, loaded where it is first used.

Knows folders and ensembles; knows nothing of any trainer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

from ensemble_rm.errors import OptionError, PinnedVersionError, StorageError

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import Aggregator
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

Tokens: TypeAlias = "Mapping[str, str | Callable[[], str]]"

_BLOCK = 1 << 20


def folder_digest(folder: Path) -> str:
    """SHA-256 of a saved ensemble's files: their names and all that they hold.

    Raises
    ------
    StorageError
        If the folder cannot be read, or holds no ensemble.
    """
    digest = hashlib.sha256()
    try:
        if not (folder / "ensemble.json").is_file():
            raise StorageError(f"{folder} holds no ensemble; save one there, or name its folder")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            digest.update(
                f"{path.relative_to(folder).as_posix()}\n{path.stat().st_size}\n".encode()
            )
            with path.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error}") from error
    return digest.hexdigest()


class PinnedEnsemble:
    """An ensemble that stays what it was when it was pinned.

    From a folder it is loaded at its first use, and crosses to other processes by its folder's
    name: each loads its own. A folder that has changed since is an error, never a new reward in the
    middle of a run. A live ensemble cannot change, and cannot cross.

    Parameters
    ----------
    source : RewardEnsemble, str or Path
        A live ensemble, or the folder of a saved one.
    aggregator : Aggregator, optional
        Of the reward; the ensemble's own where not given.
    device : str, optional
        Where a saved ensemble's members run, which must be said: ``"cpu"``, ``"cuda"`` (each
        process's current device, which accelerate sets to a rank's own) or ``"cuda:1"``.
    backbone : str or Path, optional
        Where the backbone lies now, if not where training found it.
    max_loaded_models : int, optional
        Models in memory at once; all by default.
    tokens : mapping of str to str or callable, optional
        Of a saved ensemble's members on other servers, by the member's name; see
        `RewardEnsemble.with_tokens`. They cross to other processes with it, and must pickle then.
    digest : str, optional
        What a saved ensemble must be, as `folder_digest` says it; what it is now by default. Give
        it where processes that start at different times share a version.

    Raises
    ------
    OptionError
        If a folder comes without a device, or a live ensemble with a folder's options.
    StorageError
        If the folder holds no ensemble.
    PinnedVersionError
        If it is not the one of that digest.
    """

    def __init__(
        self,
        source: RewardEnsemble | str | Path,
        *,
        aggregator: Aggregator | None = None,
        device: str | None = None,
        backbone: str | Path | None = None,
        max_loaded_models: int | None = None,
        tokens: Tokens | None = None,
        digest: str | None = None,
    ) -> None:
        self.aggregator = aggregator
        self._tokens = tokens
        self._options = {
            "device": device,
            "backbone": None if backbone is None else str(backbone),
            "max_loaded_models": max_loaded_models,
        }
        self._lock = Lock()
        self._ensemble: RewardEnsemble | None = None
        self.folder: Path | None = None
        self.digest = ""
        if isinstance(source, str | Path):
            if device is None:
                raise OptionError(
                    f"say where the members of {source} run: device='cpu', device='cuda' (each "
                    "rank's own GPU) or device='cuda:1'"
                )
            # Absolute: the process that loads it may stand elsewhere.
            self.folder = Path(source).expanduser().absolute()
            self.digest = self._checked(digest)
            return
        if digest is not None:
            raise OptionError("digest is for a saved ensemble; this one is loaded already")
        folder_only = self._options | {"tokens": tokens}
        if given := [name for name, value in folder_only.items() if value is not None]:
            raise OptionError(f"{given[0]} is for a saved ensemble; this one is loaded already")
        self._ensemble = self._with_aggregator(source)
        self.digest = live_digest(source)

    def _with_aggregator(self, ensemble: RewardEnsemble) -> RewardEnsemble:
        return ensemble if self.aggregator is None else ensemble.with_aggregator(self.aggregator)

    @property
    def ensemble(self) -> RewardEnsemble:
        """The ensemble, loaded by the first call.

        Raises
        ------
        PinnedVersionError
            If the folder is no longer what it was.
        """
        with self._lock:
            if self._ensemble is None:
                self._ensemble = self._load()
            return self._ensemble

    def _checked(self, wanted: str | None) -> str:
        assert self.folder is not None
        found = folder_digest(self.folder)
        if wanted is not None and found != wanted:
            raise PinnedVersionError(
                f"{self.folder} has changed since this run began (digest {found[:12]}, was "
                f"{wanted[:12]}); keep a run's version in a folder of its own, or start anew"
            )
        return found

    def _load(self) -> RewardEnsemble:
        from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

        assert self.folder is not None
        self._checked(self.digest)
        options: dict[str, Any] = self._options
        loaded = RewardEnsemble.from_pretrained(self.folder, **options)
        if self._tokens is not None:
            loaded = loaded.with_tokens(self._tokens)
        return self._with_aggregator(loaded)

    @property
    def version(self) -> str:
        """What the ensemble's provenance calls its version; else the head of its digest."""
        named = self.ensemble.provenance.get("version")
        return self.digest[:12] if named is None else str(named)

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is None:
            raise OptionError(
                "a live ensemble does not cross to another process; save it with save_pretrained, "
                "and give the folder instead"
            )
        state = dict(vars(self))
        del state["_lock"], state["_ensemble"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock(), _ensemble=None)


def live_digest(ensemble: RewardEnsemble) -> str:
    """Digest of what a live ensemble says of itself; its weights are not read."""
    said = {
        "names": ensemble.names,
        "normaliser": ensemble.normaliser.to_json(),
        "aggregator": ensemble.aggregator.to_json(),
        "calibration": ensemble.calibration and ensemble.calibration.to_json(),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
