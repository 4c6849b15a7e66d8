"""`train`: preference pairs → a RewardEnsemble, with everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from ensemble_rm.aggregation.aggregator import mean
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.ensemble import RewardEnsemble
from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone import DEFAULT_CACHE, Backbone, load_tokenizer, locate
from ensemble_rm.members.baseline import baseline_scores, reference_samples
from ensemble_rm.members.cache import FeatureCache, features
from ensemble_rm.members.heads import HeadScorer
from ensemble_rm.members.text import TextEncoder, count_truncation
from ensemble_rm.members.trunk import Progress, Trunk, TrunkOptions, View, default_views, silent
from ensemble_rm.samples import Preferences, require_pairs
from ensemble_rm.training.heads import HeadTrainer, PairFeatures
from ensemble_rm.training.recipe import Recipe

Kind = Literal["head"]
KINDS: tuple[str, ...] = ("head",)
_LIBRARIES = ("torch", "transformers", "numpy", "scikit-learn", "safetensors")


def train(
    fit: Preferences,
    validation: Preferences,
    *,
    backbone: str | Path,
    kind: Kind = "head",
    members: int = 5,
    seed: int = 0,
    views: Sequence[View | str] | None = None,
    options: TrunkOptions | None = None,
    recipe: Recipe | None = None,
    baseline: bool = False,
    out: str | Path | None = None,
    cache_dir: str | Path | None = DEFAULT_CACHE,
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
    kind : {"head"}
        Heads over one frozen trunk.
    members : int
        How many.
    seed : int
        Every member's own seeds are spawned from it.
    views : sequence of View or str, optional
        What each head reads, such as ``"16:mean"``; one for all, or one a member. A spread over
        the upper two thirds of the layers where not given.
    options : TrunkOptions, optional
        Template, truncation, dtype, device.
    recipe : Recipe, optional
        Epochs, learning rate and so on.
    baseline : bool
        Whether each prompt's `reference` is scored too, and its score subtracted; then the
        validation pairs, and all that is scored later, need one.
    out : str or Path, optional
        Where the ensemble is saved; a killed run with the same arguments goes on from there.
    cache_dir : str or Path, optional
        Where features are kept, so that no text is read twice; None keeps none.
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
        If an option cannot be used, or fit and validation share a prompt.
    BackboneError
        If the backbone cannot be found or read.
    NonFiniteLossError
        If training diverges.
    BaselineError
        If a baseline is asked for and a validation pair has no reference.
    ResumeError
        If `out` holds a checkpoint of another run.
    """
    options, recipe = options or TrunkOptions(), recipe or Recipe()
    if kind not in KINDS:
        raise OptionError(f"kind must be one of {KINDS}, not {kind!r}")
    if members < 1:
        raise OptionError(f"members must be at least 1, not {members}")
    require_pairs(fit, "training")
    require_pairs(validation, "validation")
    _refuse_leak(fit, validation)
    if baseline:
        reference_samples(validation.samples())
    cache_folder = None if cache_dir is None else Path(cache_dir).expanduser()
    found = locate(backbone, cache_dir=cache_folder)
    chosen = _views(views, members, found)
    trunk = Trunk(found, options, top=max(view.layer for view in chosen))
    cache = None if cache_folder is None else FeatureCache(cache_folder)
    distinct = tuple(dict.fromkeys(chosen))
    fit_features, fit_cut = _read(trunk, fit, distinct, cache, _named(progress, "fit"))
    val_features, _ = _read(trunk, validation, distinct, cache, _named(progress, "validation"))
    said = _provenance(fit, validation, found, chosen, options, recipe, seed)
    result = HeadTrainer(
        fit_features,
        val_features,
        view_of=[distinct.index(view) for view in chosen],
        recipe=recipe,
        seed=seed,
        device=trunk.device,
        checkpoint=None if out is None else _checkpoint_folder(Path(out)),
        digest=_digest(said),
    ).run(progress=progress)
    scorer = HeadScorer(found, options, chosen, result.weights, trunk=trunk)
    reference = scorer.apply(val_features.features, distinct)
    below = baseline_scores(scorer, validation.samples()) if baseline else None
    ensemble = RewardEnsemble(
        (scorer,),
        fit_normaliser(reference, validation.sample_groups(), baseline=below),
        mean(),
        provenance=said
        | _versions()
        | {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "truncation": fit_cut,
            "chosen_weight_decay": list(result.weight_decay),
            "validation_nll": list(result.validation_nll),
            "history": result.history,
        },
    )
    if out is not None:
        ensemble.save_pretrained(out)
    return ensemble


def plan(
    fit: Preferences,
    validation: Preferences,
    *,
    backbone: str | Path,
    members: int = 5,
    views: Sequence[View | str] | None = None,
    options: TrunkOptions | None = None,
    cache_dir: str | Path | None = DEFAULT_CACHE,
) -> dict[str, Any]:
    """Say what `train` would do, from config and tokenizer alone: nothing is read or trained."""
    options = options or TrunkOptions()
    require_pairs(fit, "training")
    require_pairs(validation, "validation")
    _refuse_leak(fit, validation)
    found = locate(backbone, cache_dir=None if cache_dir is None else Path(cache_dir))
    encoder = TextEncoder(
        load_tokenizer(found.folder), template=options.template, max_length=options.max_length
    )
    encoded = encoder.encode([*fit.samples(), *validation.samples()])
    return {
        "backbone": found.name,
        "views": [str(view) for view in _views(views, members, found)],
        "template": encoder.template,
        "fit_pairs": len(fit),
        "validation_pairs": len(validation),
        "tokens": sum(len(e.ids) for e in encoded),
        "truncation": asdict(count_truncation(encoded)),
    }


def _named(progress: Progress, part: str) -> Progress:
    return lambda stage, done, total: progress(f"{stage} {part}", done, total)


def _refuse_leak(fit: Preferences, validation: Preferences) -> None:
    shared = fit.prompt_keys & validation.prompt_keys
    if shared:
        raise OptionError(
            f"{len(shared)} prompts stand in both the training and the validation pairs; "
            "split by prompt with pairs.split(…)"
        )


def _views(
    views: Sequence[View | str] | None, members: int, backbone: Backbone
) -> tuple[View, ...]:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(str(backbone.folder))
    depth = int(config.get_text_config().num_hidden_layers)
    if views is None:
        return default_views(depth, members)
    given = tuple(View.parse(view) if isinstance(view, str) else view for view in views)
    if len(given) == 1:
        given *= members
    if len(given) != members:
        raise OptionError(f"{len(given)} views for {members} members; give one, or one a member")
    for view in given:
        if not 1 <= view.layer <= depth:
            raise OptionError(f"view {view}: {backbone.name} has layers 1 to {depth}")
    return given


def _read(
    trunk: Trunk,
    pairs: Preferences,
    views: Sequence[View],
    cache: FeatureCache | None,
    progress: Progress,
) -> tuple[PairFeatures, dict[str, int]]:
    encoded = trunk.encoder.encode(pairs.samples())
    read = features(trunk, encoded, views, cache=cache, progress=progress)
    data = PairFeatures(read, pairs.targets, pairs.weights, pairs.margins, pairs.groups)
    return data, asdict(count_truncation(encoded))


def _checkpoint_folder(out: Path) -> Path:
    out = out.expanduser()
    return out.parent / f".{out.name}.training"


def _provenance(
    fit: Preferences,
    validation: Preferences,
    backbone: Backbone,
    views: Sequence[View],
    options: TrunkOptions,
    recipe: Recipe,
    seed: int,
) -> dict[str, Any]:
    """Return all that decides the result, as JSON."""
    return {
        "kind": "head",
        "seed": seed,
        "backbone": {"name": backbone.name, "digest": backbone.digest},
        "views": [str(view) for view in views],
        "options": asdict(replace(options, device=None)),
        "recipe": asdict(recipe),
        "data": {
            "fit": {"source": fit.source, "pairs": len(fit), "digest": fit.digest},
            "validation": {
                "source": validation.source,
                "pairs": len(validation),
                "digest": validation.digest,
            },
        },
    }


def _digest(said: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, Any]:
    found = {}
    for name in ("ensemble-rm", *_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return {"versions": found, "python": platform.python_version()}
