"""`train`: preference pairs → a RewardEnsemble, with everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.rules.mean import mean
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.data.samples import Preferences, require_pairs
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.ensemble.storage import check_target
from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.backbone.checkpoint import load_tokenizer, locate
from ensemble_rm.members.backbone.custom_code import trusted_models
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.encoding import TextEncoder, count_truncation
from ensemble_rm.members.learning.job import Job, Trained
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.members.learning.seeds import member_seeds
from ensemble_rm.members.registry import make_recipe, member_kind
from ensemble_rm.progress import Progress, silent
from ensemble_rm.scoring.baselines import baseline_scores, reference_samples
from ensemble_rm.training.request import TrainingRequest
from ensemble_rm.uncertainty.distance import MIN_SAMPLES, FeatureSpace, fit_feature_space

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "numpy", "scikit-learn", "safetensors")


def train(
    fit: Preferences,
    validation: Preferences,
    *,
    backbone: str | Path,
    kind: str | None = None,
    members: int = 5,
    seed: int = 0,
    recipe: Recipe | None = None,
    options: TrunkOptions | None = None,
    start: RewardEnsemble | None = None,
    baseline: bool = False,
    out: str | Path | None = None,
    cache_dir: str | Path | None = DEFAULT_CACHE,
    trust_remote_code: Sequence[str] = (),
    progress: Progress = silent,
) -> RewardEnsemble:
    """Train several independently seeded reward models.

    Parameters
    ----------
    fit : Preferences
        The pairs that members learn from.
    validation : Preferences
        Pairs of other prompts: they stop training early and set the normaliser.
    backbone : str or Path
        A pretrained model: hub id, local folder, or a folder with one GGUF file.
    kind : {"head", "branch", "lora", "full"}, optional
        Heads over one frozen trunk; copies of its top blocks, each with a head; LoRA adapters on
        its blocks, each with a head; or fine-tuned copies of the whole model. The recipe's kind
        where not given, ``"head"`` where there is no recipe either.
    members : int
        Number of members.
    seed : int
        Every member's own seeds are spawned from it.
    recipe : HeadRecipe, BranchRecipe, LoraRecipe or FullRecipe, optional
        Views, blocks, epochs, learning rate and so on; the kind's defaults where not given.
    options : TrunkOptions, optional
        Template, truncation, dtype, device.
    start : RewardEnsemble, optional
        An ensemble of the same kind, backbone, number of members, views, blocks and adapters; each
        member continues from its own weights there. Solved heads have one optimum wherever they
        start. Unless they are full members, those that training cannot better on the validation
        pairs keep their weights.
    baseline : bool
        Whether the score of each prompt's `reference` is subtracted; then the validation pairs,
        and all that is scored later, need one.
    out : str or Path, optional
        Where the ensemble is saved; a killed run with the same arguments resumes from there.
    cache_dir : str or Path, optional
        Folder of cached features and token states, so that no text is read twice; None caches
        nothing.
    trust_remote_code : sequence of str
        Models whose custom code may run, each as ``MODEL@DIGEST``; the error of a model that needs
        such code states its digest. Not for kind ``"full"``.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RewardEnsemble
        Normalised and not calibrated. Its aggregator is the mean; `calibrate` takes another.

    Raises
    ------
    DataError
        If a part has no pairs.
    OptionError
        If an option cannot be used, `kind` is not the recipe's, fit and validation share a
        prompt, or `start` does not fit.
    ModelError
        If the backbone cannot be found or read.
    CustomCodeError
        If it needs custom code that is not allowed.
    TrainingError
        If training diverges.
        If `out` holds a checkpoint of another run.
    BaselineError
        If a baseline is wanted and a validation pair has no reference.
    StorageError
        If `out` holds versions, or something other than an ensemble.
        If the token states would exceed the recipe's `states_limit` or the disk.
    MissingExtraError
        If a package that the kind needs is not installed.
    """
    request = TrainingRequest(
        backbone=backbone,
        recipe=_recipe_of(kind, recipe),
        members=members,
        seed=seed,
        options=options,
        start=start,
        baseline=baseline,
        out=out,
        cache_dir=cache_dir,
        trust_remote_code=trusted_models(trust_remote_code),
    )
    return train_request(fit, validation, request, progress=progress)


def _recipe_of(kind: str | None, recipe: Recipe | None) -> Recipe:
    if recipe is None:
        return make_recipe(kind or "head")
    if kind is not None and kind != recipe.kind:
        raise OptionError(
            f"{type(recipe).__name__} is the recipe of kind {recipe.kind!r}, not of {kind!r}; "
            f"give a {member_kind(kind).recipe_class().__name__}, or leave `kind` out"
        )
    return recipe


def train_request(
    fit: Preferences,
    validation: Preferences,
    request: TrainingRequest,
    *,
    progress: Progress = silent,
) -> RewardEnsemble:
    """Do what `train` does, from one request object.

    Parameters
    ----------
    fit, validation : Preferences
    request : TrainingRequest
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RewardEnsemble

    Raises
    ------
    EnsembleRMError
        What `train` raises.
    """
    out = None if request.out is None else Path(request.out).expanduser()
    if out is not None:
        # Before hours of training, not after.
        check_target(out)
    job, provenance = _prepare(fit, validation, request, progress=progress)
    if request.baseline:
        reference_samples(validation.samples())  # a missing reference is an error before the work
    trained = member_kind(request.kind).trainer()(job)
    below = _baselines(trained, validation) if request.baseline else None
    # Outside the run's digest: an upgrade of a library must not forbid resuming.
    provenance |= _versions() | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    ensemble = RewardEnsemble(
        trained.scorers,
        fit_normaliser(trained.reference, validation.sample_groups(), baseline=below),
        mean(),
        provenance=provenance | {"truncation": trained.truncation.to_json()} | trained.record,
        feature_space=_feature_space(trained),
    )
    if out is None:
        return ensemble
    ensemble.save_pretrained(out)
    if job.checkpoint is not None:
        # Only after the save: a kill in between still resumes.
        shutil.rmtree(job.checkpoint, ignore_errors=True)
    if trained.in_checkpoint:
        # The weights were read from the checkpoint that is gone now.
        return RewardEnsemble.from_pretrained(out, device=job.options.device)
    return ensemble


def plan(fit: Preferences, validation: Preferences, request: TrainingRequest) -> dict[str, Any]:
    """Return what `train` would do, from config and tokenizer alone; no weights are read.

    Parameters
    ----------
    fit, validation : Preferences
    request : TrainingRequest

    Returns
    -------
    dict
        Backbone, kind, members, the resolved recipe, template, numbers of pairs and tokens,
        truncation, and bytes of token states, as JSON values.

    Raises
    ------
    EnsembleRMError
        What `train` raises before it reads weights.
    """
    # No progress and no checkpoint: a plan only reads.
    job, _ = _prepare(fit, validation, request)
    encoder = TextEncoder(
        load_tokenizer(job.backbone.folder, code=job.backbone.code),
        template=job.options.template,
        max_length=job.options.max_length,
    )
    # Both parts: validation samples are encoded and scored too.
    encoded = encoder.encode([*fit.samples(), *validation.samples()])
    return {
        "backbone": job.backbone.name,
        "kind": request.kind,
        "members": request.members,
        "recipe": job.recipe.to_json(),
        "template": encoder.template,
        "fit_pairs": len(fit),
        "validation_pairs": len(validation),
        "tokens": sum(len(e.ids) for e in encoded),
        "truncation": count_truncation(encoded).to_json(),
        "token_states_bytes": job.recipe.states_bytes(
            job.backbone, encoded, dtype=job.options.dtype
        ),
    }


def _prepare(
    fit: Preferences,
    validation: Preferences,
    request: TrainingRequest,
    *,
    progress: Progress = silent,
) -> tuple[Job[Any], dict[str, Any]]:
    """Check and resolve a request: the job, and all that decides its result as JSON."""
    require_pairs(fit, "training")
    require_pairs(validation, "validation")
    _refuse_leak(fit, validation)
    # expanduser here, since a literal "~" folder would be created in the working directory.
    cache = None if request.cache_dir is None else Path(request.cache_dir).expanduser()
    backbone = locate(
        request.backbone, cache_dir=cache, trust_remote_code=request.trust_remote_code
    )
    recipe = request.recipe.resolve(backbone, request.members)
    options = request.options or TrunkOptions()
    provenance: dict[str, Any] = {
        "kind": request.kind,
        "seed": request.seed,
        "members": request.members,
        "backbone": {"name": backbone.name, "digest": backbone.digest},
        # The device is no part of the result: a run may resume on another one.
        "options": asdict(replace(options, device=None)),
        "recipe": recipe.to_json(),
        "data": {
            part: {"source": pairs.source, "pairs": len(pairs), "digest": pairs.digest}
            for part, pairs in (("fit", fit), ("validation", validation))
        },
    }
    if backbone.code is not None:
        provenance["backbone"]["code"] = backbone.code
    if request.start is not None:
        check_start(request.start, recipe, members=request.members, backbone=backbone.digest)
        # Weights by content, not by folder: a folder may have been trained on since.
        provenance["start"] = _digest_of(request.start)
    job = Job(
        fit,
        validation,
        backbone,
        member_seeds(request.seed, request.members),
        options,
        recipe,
        # Key of the checkpoint: a changed request starts over instead of mixing two runs.
        hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest(),
        checkpoint=_checkpoint_folder(request.out),
        cache_folder=cache,
        start=() if request.start is None else request.start.scorers,
        progress=progress,
    )
    return job, provenance


def _checkpoint_folder(out: str | Path | None) -> Path | None:
    """Return the folder next to `out` in which a run can be resumed."""
    if out is None:
        return None
    folder = Path(out).expanduser()
    # Hidden and next to `out`: on the same file system, and no part of the saved ensemble.
    return folder.parent / f".{folder.name}.training"


def check_start(start: RewardEnsemble, recipe: Recipe, *, members: int, backbone: str) -> None:
    """Check that training by a resolved recipe can continue from an ensemble's weights.

    Parameters
    ----------
    start : RewardEnsemble
    recipe : Recipe
    members : int
    backbone : str
        Digest of the backbone.

    Raises
    ------
    OptionError
        If kind, number, views, blocks, adapters or backbone differ.
    """
    wanted = member_kind(recipe.kind).scorer_class()
    if not all(isinstance(scorer, wanted) for scorer in start.scorers):
        names = [type(scorer).__name__ for scorer in start.scorers]
        raise OptionError(f"start: expected members of kind {recipe.kind!r}, not {names}")
    if len(start.names) != members:
        raise OptionError(f"start: expected {members} members, not {len(start.names)}")
    expected = {"backbone": backbone} | recipe.settings()
    scorers: tuple[Any, ...] = start.scorers
    for scorer in scorers:
        has: dict[str, Any] = scorer.describe() | {"backbone": scorer.trained_from}
        for name, value in expected.items():
            if has.get(name) != value:
                raise OptionError(
                    f"start: its {name} is {has.get(name)}, but the recipe needs {value}"
                )


def _digest_of(start: RewardEnsemble) -> str:
    """Return one digest of all that the members' scores depend on."""
    digest = hashlib.sha256()
    # A digest of None (a user's scorer) becomes "None": such members cannot be told apart.
    for scorer in start.scorers:
        digest.update(str(scorer.digest).encode())
    return digest.hexdigest()


def _baselines(trained: Trained, validation: Preferences) -> NDArray[np.float64]:
    """Return every member's raw score of each validation sample's reference completion."""
    samples = validation.samples()
    return np.concatenate([baseline_scores(s, samples) for s in trained.scorers], axis=1)


def _feature_space(trained: Trained) -> FeatureSpace | None:
    # Too few samples to estimate a covariance; distances are then not available.
    if trained.features is None or len(trained.features) < MIN_SAMPLES:
        return None
    return fit_feature_space(trained.features)


def _refuse_leak(fit: Preferences, validation: Preferences) -> None:
    # The same prompt on both sides makes the validation loss too low, and early stopping late.
    shared = fit.prompt_keys & validation.prompt_keys
    if shared:
        raise OptionError(
            f"{len(shared)} prompts are in both the training and the validation pairs; "
            "split by prompt with pairs.split(…)"
        )


def _versions() -> dict[str, Any]:
    versions = {}
    for name in ("ensemble-rm", *_LIBRARIES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {"versions": versions, "python": platform.python_version()}
