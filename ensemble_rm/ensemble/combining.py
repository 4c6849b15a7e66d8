"""Reward models that exist already → one ensemble: published models, saved ensembles, own scorers.

Nothing is trained; the normaliser is fitted on reference completions, so that the members' scores
have one unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.aggregation.rules.mean import mean
from ensemble_rm.calibration.normaliser import fit_normaliser
from ensemble_rm.data.samples import Preferences, require_pairs
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.full.scorer import FullScorer
from ensemble_rm.members.remote.address import Token
from ensemble_rm.members.scorer import Scorer, ScorerLike, as_scorer
from ensemble_rm.progress import Progress, silent
from ensemble_rm.scoring.model_pool import ModelPool
from ensemble_rm.scoring.pipeline import score_members
from ensemble_rm.versions.manifest import FILE


def combine(
    members: Mapping[str, ScorerLike | RewardEnsemble | str | Path],
    reference: Preferences,
    *,
    aggregator: Aggregator | None = None,
    options: TrunkOptions | None = None,
    baseline: bool = False,
    max_loaded_models: int | None = None,
    trust_remote_code: Sequence[str] = (),
    allow_remote: Sequence[str] = (),
    tokens: Mapping[str, Token] | None = None,
    progress: Progress = silent,
) -> RewardEnsemble:
    """Combine reward models, and fit their offsets and scales.

    Parameters
    ----------
    members : mapping of str to ScorerLike, RewardEnsemble, str or Path
        By name: a scorer or an object like it, an ensemble, a saved ensemble's folder, or a
        sequence-classification model of one output (Hub id or folder).
    reference : Preferences
        Pairs whose completions set each member's offset and scale; their verdicts are not used.
    aggregator : Aggregator, optional
        Combines the members' scores (default: the mean).
    options : TrunkOptions, optional
        How the models given by name read text.
    baseline : bool
        Whether the score of each prompt's `reference` completion is subtracted.
    max_loaded_models : int, optional
        Models in memory at once, here and in the ensemble; see
        `RewardEnsemble.with_max_loaded_models`.
    trust_remote_code, allow_remote, tokens
        For members that are named by a folder; see `RewardEnsemble.from_pretrained`.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RewardEnsemble
        Normalised and not calibrated.

    Raises
    ------
    OptionError
        If there is no member, or a member scores all completions of a prompt alike.
    DataError
        If there is no reference pair.
    ModelError
        If a named model cannot be a member.
    """
    require_pairs(reference, "fitting the normaliser")
    if not members:
        raise OptionError("an ensemble needs at least one member")
    given = options or TrunkOptions()
    access: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "allow_remote": allow_remote,
        "tokens": tokens,
    }
    pool = None if max_loaded_models is None else ModelPool(max_loaded_models)
    scorers: list[Scorer] = []
    for name, member in members.items():
        if pool is None:
            scorers += _open(name, member, given, access)
        else:  # a model that was loaded for a check is freed before the next is loaded
            scorers += [s.unloaded() for s in _open(name, member, given, access)]
    # Before the scorers replace them: the provenance names what the caller gave.
    sources = {name: _source(member) for name, member in members.items()}
    return normalised(
        scorers,
        reference,
        aggregator=aggregator or mean(),
        baseline=baseline,
        provenance={"members": sources},
        pool=pool,
        progress=progress,
    )


def normalised(
    scorers: Sequence[Scorer],
    reference: Preferences,
    *,
    aggregator: Aggregator,
    baseline: bool,
    provenance: dict[str, Any],
    pool: ModelPool | None = None,
    progress: Progress = silent,
) -> RewardEnsemble:
    """Combine scorers, their offsets and scales fitted on reference completions.

    Parameters
    ----------
    scorers : sequence of Scorer
    reference : Preferences
        Recorded in the provenance.
    aggregator : Aggregator
    baseline : bool
        Whether the score of each prompt's `reference` completion is subtracted.
    provenance : dict
        What else is recorded.
    pool : ModelPool, optional
        How many scorers hold their models at once, here and in the ensemble.
    progress : callable
        Called with (stage, done, total).
    """
    samples = reference.samples()
    result = score_members(scorers, samples, baseline=baseline, pool=pool, progress=progress)
    source = {"source": reference.source, "pairs": len(reference), "digest": reference.digest}
    return RewardEnsemble(
        tuple(scorers),
        fit_normaliser(
            result.raw,
            # By prompt: rewards are compared between the completions of one prompt.
            reference.sample_groups(),
            baseline=result.baseline,
            nan=aggregator.nan,
        ),
        aggregator,
        provenance=provenance | {"reference": source},
        model_pool=pool,
    )


def _open(
    name: str,
    member: ScorerLike | RewardEnsemble | str | Path,
    options: TrunkOptions,
    access: Mapping[str, Any],
) -> tuple[Scorer, ...]:
    if isinstance(member, str | Path):
        if not (Path(member).expanduser() / FILE).exists():
            trust = access["trust_remote_code"]
            return (FullScorer.from_name(member, options, name=name, trust_remote_code=trust),)
        member = RewardEnsemble.from_pretrained(member, device=options.device, **access)
    if isinstance(member, RewardEnsemble):
        return tuple(_renamed(scorer, name) for scorer in member.scorers)
    return (as_scorer(member),)


def _source(member: ScorerLike | RewardEnsemble | str | Path) -> str:
    if isinstance(member, RewardEnsemble) and member.origin is not None:
        return str(member.origin.folder)
    return str(member) if isinstance(member, str | Path) else type(member).__name__


def _renamed(scorer: Scorer, name: str) -> Scorer:
    """Return a copy with the member's name before the names of its columns."""
    # A caller's own scorer has no kind and cannot be renamed; its names are kept.
    if not scorer.kind:
        return scorer
    return scorer.with_names([f"{name}/{own}" for own in scorer.names])
