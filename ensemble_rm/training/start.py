"""Where members start that are trained again: the weights of an ensemble that training made."""

from __future__ import annotations

import hashlib
from typing import Any

from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone.trunk import TrunkOptions
from ensemble_rm.members.branches.scorer import BranchScorer
from ensemble_rm.members.full.scorer import ClassifierScorer
from ensemble_rm.members.heads.scorer import HeadScorer
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.members.lora.adapters import LoraOptions
from ensemble_rm.members.lora.scorer import LoraScorer
from ensemble_rm.members.model_scorer import ModelScorer
from ensemble_rm.members.scorer import Scorer

_KINDS: dict[str, type[ModelScorer]] = {
    "head": HeadScorer,
    "branch": BranchScorer,
    "lora": LoraScorer,
    "full": ClassifierScorer,
}


def training_arguments(ensemble: RewardEnsemble) -> dict[str, Any]:
    """Return what `train` was told of an ensemble's members, to train them again.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Made by `train`; its backbone may have moved since.

    Returns
    -------
    dict
        Arguments of `train` by name, `start` among them.

    Raises
    ------
    OptionError
        If the ensemble does not come from `train`: then it knows no recipe.
    """
    said = ensemble.provenance
    missing = [
        name for name in ("kind", "members", "backbone", "options", "recipe") if name not in said
    ]
    if missing:
        raise OptionError(
            f"the ensemble of {list(ensemble.names)} does not say how it was trained ({missing} "
            "missing): only what `train` made can be trained again; train a new one"
        )
    scorer = ensemble.scorers[0]
    kind = str(said["kind"])
    options = {**said["options"], "device": getattr(scorer, "options", TrunkOptions()).device}
    found: dict[str, Any] = {
        "kind": kind,
        "members": int(said["members"]),
        "backbone": _backbone_place(scorer, kind, said),
        "views": tuple(said["views"]) or None,
        "options": TrunkOptions(**options),
        "recipe": Recipe(**said["recipe"]),
        "baseline": ensemble.normaliser.baseline,
        "start": ensemble,
    }
    if kind in ("branch", "lora"):
        found["blocks"] = int(said["blocks"])
    if kind == "lora":
        found |= {"lora": LoraOptions(**said["lora"]), "warm_start": bool(said["warm_start"])}
    return found


def _backbone_place(scorer: Scorer, kind: str, said: dict[str, Any]) -> Any:
    """Where the pretrained model lies: a full member's backbone is its own, made from that."""
    if isinstance(scorer, ModelScorer) and kind != "full":
        return scorer.backbone.folder
    return said["backbone"]["name"]


def check_start(
    start: RewardEnsemble, *, kind: str, said: dict[str, Any], backbone: str
) -> tuple[Scorer, ...]:
    """Return the scorers that members start from, where they fit what is to be trained.

    Parameters
    ----------
    start : RewardEnsemble
    kind : str
    said : dict
        What the run's result depends on: `views`, `blocks`, `lora` count.
    backbone : str
        Digest of the backbone.

    Raises
    ------
    OptionError
        If kind, number, views, blocks, adapters or backbone differ.
    """
    scorers = start.scorers
    wanted = _KINDS[kind]
    if not all(isinstance(scorer, wanted) for scorer in scorers):
        raise OptionError(
            f"start: members of kind {kind!r} are wanted, not {[type(s).__name__ for s in scorers]}"
        )
    if len(start.names) != said["members"] or (kind != "full" and len(scorers) != 1):
        raise OptionError(f"start: {said['members']} members are wanted, not {len(start.names)}")
    for scorer in scorers:
        _compare("backbone", _backbone_of(scorer), backbone)
        described = scorer.describe() if isinstance(scorer, ModelScorer) else {}
        for name in ("views", "blocks", "lora"):
            if said.get(name):
                _compare(name, described.get(name), said[name])
    return scorers


def _backbone_of(scorer: Scorer) -> str | None:
    if isinstance(scorer, ClassifierScorer):
        return scorer.start
    assert isinstance(scorer, ModelScorer)
    return scorer.backbone.digest


def _compare(name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise OptionError(f"start: its {name} is {found}, and {wanted} is wanted")


def digest_of(start: tuple[Scorer, ...]) -> str:
    """Return one digest of all that the scorers' scores depend on."""
    found = hashlib.sha256()
    for scorer in start:
        assert scorer.digest is not None  # every kind that is trained has one
        found.update(scorer.digest.encode())
    return found.hexdigest()
