"""An ensemble on disk: saved, loaded, and loaded again where another version became current."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.normaliser import Normaliser
from ensemble_rm.ensemble import storage
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.scorer import Scorer, with_tokens_of
from ensemble_rm.scoring.score_cache import ScoreCache
from ensemble_rm.uncertainty.distance import FeatureSpace
from ensemble_rm.versions.locate import Located, locate


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an ensemble was read.

    Attributes
    ----------
    folder : Path
        As it was given.
    version, members : int, optional
        Its number, and that of the version that holds its members; None of a plain ensemble.
    fixed : bool
        Whether the version was asked for by number: then it is never left.
    options : dict
        How it was read, to read another version alike.
    """

    folder: Path
    version: int | None
    members: int | None
    fixed: bool
    options: dict[str, Any] = field(default_factory=dict)


class Stored:
    """The part of `RewardEnsemble` that reads and writes folders."""

    scorers: tuple[Scorer, ...]
    normaliser: Normaliser
    aggregator: Aggregator
    calibration: Calibration | None
    provenance: dict[str, Any]
    score_cache: ScoreCache | None
    feature_space: FeatureSpace | None
    origin: Origin | None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the ensemble as safetensors and JSON.

        Parameters
        ----------
        folder : str or Path
            Replaced as a whole where it holds an ensemble already.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        StorageError
            If a member cannot be saved, or the folder holds something else.
        VersionError
            If the folder holds versions.
        """
        return storage.save(
            Path(folder).expanduser(),
            scorers=self.scorers,
            normaliser=self.normaliser,
            aggregator=self.aggregator,
            calibration=self.calibration,
            provenance=self.provenance,
            feature_space=self.feature_space,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        version: int | None = None,
        backbone: str | Path | None = None,
        device: str | None = None,
        cache_dir: str | Path | None = DEFAULT_CACHE,
        max_loaded_models: int | None = None,
    ) -> Self:
        """Read what `save_pretrained` wrote, or a version of it; the scores are identical.

        Parameters
        ----------
        folder : str or Path
            Of an ensemble or of its versions.
        version : int, optional
            The current one, or the one that is pinned, where not given.
        backbone : str or Path, optional
            Where the backbone lies now, if not where training found it.
        device : str, optional
            The best available where none is named.
        cache_dir : str or Path, optional
            For converted GGUF weights.
        max_loaded_models : int, optional
            Models in memory at once; see `with_max_loaded_models`.

        Returns
        -------
        RewardEnsemble

        Raises
        ------
        StorageError
            If the folder holds no ensemble.
        VersionError
            If it has no version of that number.
        BackboneError
            If the backbone's weights are not those of training.
        """
        place = Path(folder).expanduser()
        options = {
            "backbone": backbone,
            "device": device,
            "cache_dir": cache_dir,
            "max_loaded_models": max_loaded_models,
        }
        found = locate(place, version)
        return cast(Self, _load(cls, place, found, fixed=version is not None, options=options))

    def refresh(self) -> Self:
        """Return the version that is current now, or this very ensemble where it is that one.

        Nothing is changed: who holds the ensemble puts the new one in its place when its owner
        says so. The aggregator, with its λ, κ or β, stays that of this ensemble; under a new
        calibration every reward is bitwise what it was, and no model is loaded again.

        Returns
        -------
        RewardEnsemble
            This one, too, where it was not read from a folder, or was asked for by number.

        Raises
        ------
        StorageError
            If the current version cannot be read.
        """
        origin = self.origin
        if origin is None or origin.fixed:
            return self
        found = locate(origin.folder)
        if found.version is None or found.version.number == origin.version:
            return self
        # A plain ensemble's members are those of the first version, which was made of it.
        if found.version.ensemble == (origin.members or 1):
            moved = replace(origin, version=found.version.number, members=found.version.ensemble)
            calibration = found.calibration or found.version.read_calibration()
            return cast(Self, replace(cast(Any, self), calibration=calibration, origin=moved))
        new = _load(type(self), origin.folder, found, fixed=False, options=origin.options)
        kept: dict[str, Any] = {"aggregator": self.aggregator, "score_cache": self.score_cache}
        kept["scorers"] = with_tokens_of(new.scorers, self.scorers)  # no token is ever saved
        return cast(Self, replace(cast(Any, new), **kept))


def _load(kind: Any, folder: Path, found: Located, *, fixed: bool, options: dict[str, Any]) -> Any:
    cache_dir = options["cache_dir"]
    parts = storage.load(
        found.ensemble,
        backbone=options["backbone"],
        device=options["device"],
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    if found.calibration is not None:
        parts["calibration"] = found.calibration
    number = None if found.version is None else found.version.number
    members = None if found.version is None else found.version.ensemble
    origin = Origin(folder, number, members, fixed, options)
    return kind(**parts, origin=origin).with_max_loaded_models(options["max_loaded_models"])
