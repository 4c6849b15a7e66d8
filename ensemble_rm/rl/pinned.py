"""One version of an ensemble for a whole run, loaded at its first use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
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
    """SHA-256 of a saved ensemble's files: their names and contents.

    Raises
    ------
    StorageError
        If the folder cannot be read, or has no ensemble.
    """
    digest = hashlib.sha256()
    try:
        if not (folder / "ensemble.json").is_file():
            raise StorageError(
                f"{folder} has no ensemble.json; name the folder of a saved ensemble"
            )
        # Names and sizes too: moved bytes between two files must change the digest.
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
    """An ensemble whose version stays the same for a whole run.

    A saved ensemble is loaded at its first use. It is pickled as the name of its folder, so that
    each process loads its own copy. If the folder changes in the meantime, that is an error: the
    reward never changes in the middle of a run. A live ensemble cannot change, and cannot be
    pickled.

    Parameters
    ----------
    source : RewardEnsemble, str or Path
        A live ensemble, or the folder of a saved one.
    aggregator : Aggregator, optional
        Aggregator of the reward (default: the ensemble's).
    device : str, optional
        Device of a saved ensemble's members, required for a folder: ``"cpu"``, ``"cuda"`` (each
        process's current device, which accelerate sets to the rank's own) or ``"cuda:1"``.
    backbone : str or Path, optional
        Folder of the backbone, if it has moved since training.
    max_loaded_models : int, optional
        Maximum number of models in memory at once (default: all).
    trust_remote_code : sequence of str, optional
        Models whose custom code may run; see `RewardEnsemble.from_pretrained`.
    allow_remote : sequence of str, optional
        Servers that members may be on; see `RewardEnsemble.from_pretrained`.
    tokens : mapping of str to str or callable, optional
        Bearer tokens of members on other servers, by server; see
        `RewardEnsemble.with_tokens`. They are pickled with the rest.
    digest : str, optional
        Digest that the folder must have, as `folder_digest` returns it (default: its present
        digest). Give it if processes that start at different times must share a version.

    Raises
    ------
    OptionError
        If a folder is given without a device, or a live ensemble with options of a folder.
    StorageError
        If the folder has no ensemble.
    PinnedVersionError
        If the folder has another digest.

    Examples
    --------
    >>> reward = trl_reward(PinnedEnsemble("runs/hh", device="cuda"))  # doctest: +SKIP
    """

    def __init__(
        self,
        source: RewardEnsemble | str | Path,
        *,
        aggregator: Aggregator | None = None,
        device: str | None = None,
        backbone: str | Path | None = None,
        max_loaded_models: int | None = None,
        trust_remote_code: Sequence[str] | None = None,
        allow_remote: Sequence[str] | None = None,
        tokens: Tokens | None = None,
        digest: str | None = None,
    ) -> None:
        self.aggregator = aggregator
        self._options: dict[str, Any] = {
            "device": device,
            "backbone": None if backbone is None else str(backbone),
            "max_loaded_models": max_loaded_models,
            "trust_remote_code": trust_remote_code,
            "allow_remote": allow_remote,
            "tokens": tokens,
        }
        self._lock = Lock()
        self._ensemble: RewardEnsemble | None = None
        self.folder: Path | None = None
        self.digest = ""
        if isinstance(source, str | Path):
            # No default: each rank of a run would load its model on the same GPU.
            if device is None:
                raise OptionError(
                    f"{source} needs a device for its members: device='cpu', device='cuda' (each "
                    "rank's own GPU) or device='cuda:1'"
                )
            # Absolute: the process that loads it may have another working directory.
            self.folder = Path(source).expanduser().absolute()
            # Hashed now, loaded later: the run's version is fixed here.
            self.digest = self._checked(digest)
            return
        if digest is not None:
            raise OptionError("digest is for a saved ensemble; this one is already loaded")
        if given := [name for name, value in self._options.items() if value is not None]:
            raise OptionError(f"{given[0]} is for a saved ensemble; this one is already loaded")
        self._ensemble = self._with_aggregator(source)
        self.digest = live_digest(source)

    def _with_aggregator(self, ensemble: RewardEnsemble) -> RewardEnsemble:
        return ensemble if self.aggregator is None else ensemble.with_aggregator(self.aggregator)

    @property
    def ensemble(self) -> RewardEnsemble:
        """The ensemble, loaded at the first access.

        Raises
        ------
        PinnedVersionError
            If the folder has changed.
        """
        # Under the lock: threads of one process load the models once.
        with self._lock:
            if self._ensemble is None:
                self._ensemble = self._load()
            return self._ensemble

    def _checked(self, wanted: str | None) -> str:
        assert self.folder is not None
        digest = folder_digest(self.folder)
        if wanted is not None and digest != wanted:
            raise PinnedVersionError(
                f"{self.folder} has changed since this run began (digest {digest[:12]}, was "
                f"{wanted[:12]}); restore it, or keep each run's version in a folder of its own"
            )
        return digest

    def _load(self) -> RewardEnsemble:
        from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

        assert self.folder is not None
        # The folder may have changed between pinning and the first reward call.
        self._checked(self.digest)
        given = {name: value for name, value in self._options.items() if value is not None}
        return self._with_aggregator(RewardEnsemble.from_pretrained(self.folder, **given))

    @property
    def version(self) -> str:
        """The version in the ensemble's provenance; else the first characters of its digest."""
        named = self.ensemble.provenance.get("version")
        return self.digest[:12] if named is None else str(named)

    def __getstate__(self) -> dict[str, Any]:
        if self.folder is None:
            raise OptionError(
                "a live ensemble cannot be sent to another process; save it with save_pretrained, "
                "and pin the folder"
            )
        state = dict(vars(self))
        # Locks and models do not travel; the other process loads from the folder.
        del state["_lock"], state["_ensemble"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock(), _ensemble=None)


def pinned(ensemble: RewardEnsemble | PinnedEnsemble) -> PinnedEnsemble:
    """Return the pinned ensemble that a reward function scores with.

    Raises
    ------
    OptionError
        If `ensemble` is a folder, which must be pinned first.
    """
    if isinstance(ensemble, PinnedEnsemble):
        return ensemble
    if isinstance(ensemble, str | Path):
        raise OptionError(
            f"pin a saved ensemble first: PinnedEnsemble({str(ensemble)!r}, device='cuda')"
        )
    return PinnedEnsemble(ensemble)


def live_digest(ensemble: RewardEnsemble) -> str:
    """Digest of a live ensemble's names, normaliser, aggregator and calibration."""
    content = {
        "names": ensemble.names,
        "normaliser": ensemble.normaliser.to_json(),
        "aggregator": ensemble.aggregator.to_json(),
        "calibration": ensemble.calibration and ensemble.calibration.to_json(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
