"""`train`: preference pairs → a RewardEnsemble, with everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.rules.mean import mean
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.data.samples import Preferences, require_pairs
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.ensemble.storage import check_target
from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone.checkpoint import DEFAULT_CACHE, load_tokenizer, locate
from ensemble_rm.members.backbone.token_states import DEFAULT_MAX_BYTES, states_bytes
from ensemble_rm.members.backbone.trunk import TrunkOptions, View
from ensemble_rm.members.branches.training import train_branches
from ensemble_rm.members.encoding import TextEncoder, count_truncation
from ensemble_rm.members.heads.training import train_heads
from ensemble_rm.members.heads.views import read_shape, resolve_views
from ensemble_rm.members.learning.job import Job, Trained
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.members.learning.seeds import member_seeds
from ensemble_rm.members.lora.adapters import LoraOptions
from ensemble_rm.members.lora.training import train_lora
from ensemble_rm.members.scorer import Scorer
from ensemble_rm.progress import Progress, silent
from ensemble_rm.scoring.baselines import baseline_scores, reference_samples
from ensemble_rm.training.start import check_start, digest_of
from ensemble_rm.uncertainty.distance import MIN_SAMPLES, FeatureSpace, fit_feature_space

Kind = Literal["head", "branch", "lora", "full"]
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "numpy", "scikit-learn", "safetensors")


def train(
    fit: Preferences,
    validation: Preferences,
    *,
    backbone: str | Path,
    kind: Kind = "head",
    members: int = 5,
    seed: int = 0,
    views: Sequence[View | str] | None = None,
    blocks: int | None = None,
    lora: LoraOptions | None = None,
    warm_start: bool = False,
    start: RewardEnsemble | None = None,
    options: TrunkOptions | None = None,
    recipe: Recipe | None = None,
    baseline: bool = False,
    out: str | Path | None = None,
    cache_dir: str | Path | None = DEFAULT_CACHE,
    states_limit: int = DEFAULT_MAX_BYTES,
    trainer_args: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    progress: Progress = silent,
) -> RewardEnsemble:
    """Train several independently seeded reward models.

    Parameters
    ----------
    fit : Preferences
        What the members learn from.
    validation : Preferences
        Other prompts: stops training early, and sets the normaliser.
    backbone : str or Path
        A pretrained model: hub id, local folder, or a folder with one GGUF file.
    kind : {"head", "branch", "lora", "full"}
        Heads over one frozen trunk; copies of its top blocks, each with a head; LoRA adapters on
        its blocks, each with a head; or fine-tuned copies of the whole model.
    members : int
        How many.
    seed : int
        Every member's own seeds are spawned from it.
    views : sequence of View or str, optional
        What each head reads, such as ``"16:mean"``; one for all, or one a member. A spread over
        the upper half of the layers where not given. Branches and adapters are read at the deepest
        layer, by both poolings where not given; full members by their architecture's own rule.
    blocks : int, optional
        How many top blocks a branch copies, 2 where not given, or an adapter changes, all where
        not given; what lies below runs once for all members.
    lora : LoraOptions, optional
        Rank, scale and targets of the adapters, for kind ``"lora"``.
    warm_start : bool
        Whether one adapter is fitted first and merged, and the members' start from there; for kind
        ``"lora"``.
    start : RewardEnsemble, optional
        Members of the same kind, backbone, views, blocks and adapters, whose weights these go on
        from, each from its own. Linear heads that are solved have one optimum wherever they start.
        A member that training cannot better on the validation pairs stays what it was, but for
        full members.
    options : TrunkOptions, optional
        Template, truncation, dtype, device.
    recipe : Recipe, optional
        Epochs, learning rate and so on; ``Recipe.of(kind)`` where not given.
    baseline : bool
        Whether each prompt's `reference` is scored too, and its score subtracted; then the
        validation pairs, and all that is scored later, need one.
    out : str or Path, optional
        Where the ensemble is saved; a killed run with the same arguments goes on from there.
    cache_dir : str or Path, optional
        Where features and token states are kept, so that no text is read twice; None keeps none.
    states_limit : int
        Largest size of the token states that branches are trained on, in bytes.
    trainer_args : mapping, optional
        More of transformers' TrainingArguments, for full members: trackers, FSDP, DeepSpeed.
    callbacks : sequence of TrainerCallback
        Of transformers' Trainer, for full members.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RewardEnsemble
        Normalised and not calibrated, its aggregator the mean: a conservative one has a
        coefficient, which `calibrate` is told.

    Raises
    ------
    EmptyDataError
        If a part has no pairs.
    OptionError
        If an option cannot be used, fit and validation share a prompt, or `start` is of another
        kind than what is to be trained.
    BackboneError
        If the backbone cannot be found or read.
    NonFiniteLossError
        If training diverges.
    BaselineError
        If a baseline is asked for and a validation pair has no reference.
    ResumeError
        If `out` holds a checkpoint of another run.
    StorageError
        If `out` holds versions, or something else than an ensemble.
    CacheLimitError
        If the token states would outgrow `states_limit` or the disk.
    MissingExtraError
        If kind ``"lora"`` is asked for and peft is not installed.
    """
    if out is not None:
        check_target(Path(out).expanduser())
    job, said = _prepare(
        fit,
        validation,
        backbone=backbone,
        kind=kind,
        members=members,
        seed=seed,
        views=views,
        blocks=blocks,
        lora=lora,
        warm_start=warm_start,
        start=start,
        options=options or TrunkOptions(),
        recipe=recipe or Recipe.of(kind),
        out=None if out is None else Path(out).expanduser(),
        cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
    )
    job = replace(
        job,
        states_limit=states_limit,
        trainer_args=trainer_args or {},
        callbacks=callbacks,
        progress=progress,
    )
    if baseline:
        reference_samples(validation.samples())  # a missing one is refused before the work
    trained = _trainer_of(kind)(job)
    below = _baselines(trained, validation) if baseline else None
    provenance = said | _versions() | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
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
        shutil.rmtree(job.checkpoint, ignore_errors=True)
    if kind == "full":  # its models lay in the checkpoint's folder
        return RewardEnsemble.from_pretrained(out, device=job.options.device)
    return ensemble


def _baselines(trained: Trained, validation: Preferences) -> NDArray[np.float64]:
    """Return every member's raw score of each validation sample's reference completion."""
    samples = validation.samples()
    return np.concatenate([baseline_scores(s, samples) for s in trained.scorers], axis=1)


def _feature_space(trained: Trained) -> FeatureSpace | None:
    if trained.features is None or len(trained.features) < MIN_SAMPLES:
        return None
    return fit_feature_space(trained.features)


def _trainer_of(kind: str) -> Callable[[Job], Trained]:
    """Return what trains a kind of member; the Trainer is imported only for `full`."""
    if kind == "full":
        from ensemble_rm.members.full.training import train_full

        return train_full
    if kind == "lora":
        return train_lora
    return train_branches if kind == "branch" else train_heads


def _prepare(
    fit: Preferences,
    validation: Preferences,
    *,
    backbone: str | Path,
    kind: Kind,
    members: int,
    seed: int,
    views: Sequence[View | str] | None,
    blocks: int | None,
    lora: LoraOptions | None,
    warm_start: bool,
    start: RewardEnsemble | None = None,
    options: TrunkOptions,
    recipe: Recipe,
    out: Path | None,
    cache_dir: Path | None,
) -> tuple[Job, dict[str, Any]]:
    """Check and resolve every option: the job, and all that decides its result as JSON."""
    if members < 1:
        raise OptionError(f"members must be at least 1, not {members}")
    recipe.check(kind)
    if kind != "lora" and (lora is not None or warm_start):
        raise OptionError(f"lora and warm_start belong to kind 'lora', not to {kind!r}")
    require_pairs(fit, "training")
    require_pairs(validation, "validation")
    _refuse_leak(fit, validation)
    found = locate(backbone, cache_dir=cache_dir)
    chosen, count = resolve_views(views, members, found, kind=kind, blocks=blocks)
    said: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "members": members,
        "backbone": {"name": found.name, "digest": found.digest},
        "views": [str(view) for view in chosen],
        "options": asdict(replace(options, device=None)),
        "recipe": asdict(recipe),
        "data": {
            part: {"source": pairs.source, "pairs": len(pairs), "digest": pairs.digest}
            for part, pairs in (("fit", fit), ("validation", validation))
        },
    }
    if kind in ("branch", "lora"):
        said["blocks"] = count
    if kind == "lora":
        said |= {"lora": asdict(lora or LoraOptions()), "warm_start": warm_start}
    scorers: tuple[Scorer, ...] = ()
    if start is not None:
        scorers = check_start(start, kind=kind, said=said, backbone=found.digest)
        said["start"] = digest_of(scorers)
    job = Job(
        fit,
        validation,
        found,
        member_seeds(seed, members),
        chosen,
        count,
        options,
        recipe,
        hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
        None if out is None else out.parent / f".{out.name}.training",
        cache_dir,
        lora=lora or LoraOptions(),
        warm_start=warm_start,
        start=scorers,
    )
    return job, said


def plan(
    fit: Preferences,
    validation: Preferences,
    *,
    backbone: str | Path,
    kind: Kind = "head",
    members: int = 5,
    views: Sequence[View | str] | None = None,
    blocks: int | None = None,
    lora: LoraOptions | None = None,
    warm_start: bool = False,
    options: TrunkOptions | None = None,
    recipe: Recipe | None = None,
    cache_dir: str | Path | None = DEFAULT_CACHE,
) -> dict[str, Any]:
    """Say what `train` would do, from config and tokenizer alone: nothing is read or trained."""
    job, said = _prepare(
        fit,
        validation,
        backbone=backbone,
        kind=kind,
        members=members,
        seed=0,
        views=views,
        blocks=blocks,
        lora=lora,
        warm_start=warm_start,
        options=options or TrunkOptions(),
        recipe=recipe or Recipe.of(kind),
        out=None,
        cache_dir=None if cache_dir is None else Path(cache_dir),
    )
    encoder = TextEncoder(
        load_tokenizer(job.backbone.folder),
        template=job.options.template,
        max_length=job.options.max_length,
    )
    encoded = encoder.encode([*fit.samples(), *validation.samples()])
    found: dict[str, Any] = {
        "backbone": job.backbone.name,
        "kind": kind,
        "members": members,
        "views": said["views"],
        "template": encoder.template,
        "fit_pairs": len(fit),
        "validation_pairs": len(validation),
        "tokens": sum(len(e.ids) for e in encoded),
        "truncation": count_truncation(encoded).to_json(),
    }
    if kind in ("branch", "lora"):
        depth, width = read_shape(job.backbone)
        size = states_bytes(encoded, width=width, dtype=job.options.dtype)
        shared = job.blocks < depth
        found |= {"blocks": job.blocks, "token_states_bytes": size if shared else 0}
    return found


def _refuse_leak(fit: Preferences, validation: Preferences) -> None:
    shared = fit.prompt_keys & validation.prompt_keys
    if shared:
        raise OptionError(
            f"{len(shared)} prompts stand in both the training and the validation pairs; "
            "split by prompt with pairs.split(…)"
        )


def _versions() -> dict[str, Any]:
    found = {}
    for name in ("ensemble-rm", *_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return {"versions": found, "python": platform.python_version()}
