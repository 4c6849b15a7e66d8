"""`TrainingRequest`: the options of a training run, for `train`, its command and retraining."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.errors import OptionError
from ensemble_rm.field_help import with_field_help
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.members.registry import make_recipe, member_kind

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble


@with_field_help
@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRequest:
    """All arguments of `train` except the pairs."""

    backbone: str | Path = field(
        metadata={"help": "pretrained model: hub id, local folder, or a folder with one GGUF file"}
    )
    recipe: Recipe = field(
        default_factory=lambda: make_recipe("head"),
        metadata={"help": "how members are trained; its class decides the kind of member"},
    )
    members: int = field(default=5, metadata={"help": "number of members"})
    seed: int = field(
        default=0, metadata={"help": "seed from which every member's own seeds are spawned"}
    )
    options: TrunkOptions | None = field(
        default=None,
        metadata={"help": "template, truncation, dtype and device (default: TrunkOptions())"},
    )
    start: RewardEnsemble | None = field(
        default=None,
        metadata={
            "help": "ensemble whose members' weights training continues from: same kind, backbone, "
            "number, views, blocks and adapters"
        },
    )
    baseline: bool = field(
        default=False,
        metadata={
            "help": "whether the score of each prompt's reference completion is subtracted; the "
            "validation pairs, and all samples scored later, then need one"
        },
    )
    out: str | Path | None = field(
        default=None,
        metadata={
            "help": "folder where the ensemble is saved; a killed run with the same request "
            "resumes from there"
        },
    )
    cache_dir: str | Path | None = field(
        default=DEFAULT_CACHE,
        metadata={"help": "folder of cached features and token states; none caches nothing"},
    )

    trust_remote_code: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "model whose custom code may run, with the digest of that code; repeated",
            "metavar": "MODEL@DIGEST",
            "shown": "none",
            "from_file": False,
        },
    )

    def __post_init__(self) -> None:
        if self.members < 1:
            raise OptionError(f"members must be at least 1, not {self.members}")
        if not isinstance(self.recipe, Recipe):
            raise OptionError(
                f"recipe must be a recipe such as HeadRecipe(), not {type(self.recipe).__name__}"
            )

    @property
    def kind(self) -> str:
        """The kind of member that is trained."""
        return self.recipe.kind

    @classmethod
    def of(cls, ensemble: RewardEnsemble) -> TrainingRequest:
        """Return the request that made an ensemble, with `start` set: to train it further.

        Parameters
        ----------
        ensemble : RewardEnsemble
            Made by `train`, of this version or an older one; its backbone may have moved since.

        Returns
        -------
        TrainingRequest
            Its seed, `out` and `cache_dir` are the defaults.

        Raises
        ------
        OptionError
            If the ensemble was not made by `train`: then no recipe is known.
        """
        provenance = ensemble.provenance
        needed = ("kind", "members", "backbone", "options", "recipe")
        missing = [name for name in needed if name not in provenance]
        if missing:
            raise OptionError(
                f"the ensemble of {list(ensemble.names)} does not say how it was trained "
                f"({missing} missing): only what `train` made can be trained again; train a new one"
            )
        scorer: Any = ensemble.scorers[0]
        device = getattr(scorer, "options", TrunkOptions()).device
        # Seeds are not taken over: a second run from the same weights should draw other batches.
        return cls(
            backbone=_backbone_folder(scorer, provenance),
            recipe=member_kind(provenance["kind"]).recipe_class().from_provenance(provenance),
            members=int(provenance["members"]),
            options=TrunkOptions(**{**provenance["options"], "device": device}),
            start=ensemble,
            baseline=ensemble.normaliser.baseline,
            trust_remote_code=_allowed(scorer),
        )


def _allowed(scorer: Any) -> tuple[str, ...]:
    """Return the permission under which this process loaded the backbone's custom code."""
    own = getattr(scorer, "backbone", None)
    return () if own is None or own.code is None else (f"{own.folder}@{own.code}",)


def _backbone_folder(scorer: Any, provenance: Mapping[str, Any]) -> str | Path:
    """Return where the pretrained model is now: with the members, unless they have their own."""
    trained_on: Mapping[str, str] = provenance["backbone"]
    own = getattr(scorer, "backbone", None)
    # The digest decides: another pretrained model may lie under the same name by now.
    if own is not None and own.digest == trained_on["digest"]:
        folder: Path = own.folder
        return folder
    return trained_on["name"]
