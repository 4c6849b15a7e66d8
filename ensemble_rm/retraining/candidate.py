"""`retrain`: an ensemble, its old pairs and new judgments → a candidate and a verdict.

It publishes nothing and does not change the incumbent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.methods.temperature import fit_temperature
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.data.samples import Preferences, require_pairs
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import CalibrationError, TooFewJudgmentsError
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.heads.scorer import HeadScorer
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.progress import Progress, silent
from ensemble_rm.retraining.gate import Answer, RetrainingGate, gate_members
from ensemble_rm.retraining.options import RetrainingOptions
from ensemble_rm.retraining.splits import RetrainingParts, split_judgments
from ensemble_rm.retraining.unit_matching import reward_units, same_units
from ensemble_rm.training.request import TrainingRequest
from ensemble_rm.training.run import train_request


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """The result of `retrain`.

    Attributes
    ----------
    answer : {"publish", "keep", "too few"}
    reason : str
        Why, in words.
    ensemble : RewardEnsemble, optional
        The candidate, in the incumbent's units and calibrated on calibration and gate; None unless
        it passed the gate.
    candidate : RewardEnsemble, optional
        The retrained members in the incumbent's units, not calibrated; None if nothing was
        trained.
    gate : RetrainingGate, optional
        None where the gate was not reached.
    details : dict
        Parts, effective sizes, temperatures, units: JSON values.
    """

    answer: Answer
    reason: str
    ensemble: RewardEnsemble | None = None
    candidate: RewardEnsemble | None = None
    gate: RetrainingGate | None = None
    details: dict[str, Any] = field(default_factory=dict)


def retrain(
    ensemble: RewardEnsemble,
    old: Preferences,
    judgments: Sequence[Judgment],
    *,
    reference: Preferences | None = None,
    recipe: Recipe | None = None,
    options: RetrainingOptions | None = None,
    out: str | Path | None = None,
    cache_dir: str | Path | None = DEFAULT_CACHE,
    progress: Progress = silent,
) -> Retraining:
    """Continue training on old pairs and new judgments, and judge the result on the newest.

    Parameters
    ----------
    ensemble : RewardEnsemble
        The incumbent, made by `train` or by this function; it is not changed.
    old : Preferences
        Its training pairs.
    judgments : sequence of Judgment
        The new ones, dated; votes become soft labels.
    reference : Preferences, optional
        Pairs on whose completions the reward keeps its spread (default: `old`). Use the same ones
        every time.
    recipe : Recipe, optional
        Default: the incumbent's own.
    options : RetrainingOptions, optional
        Split, gate, seed.
    out : str or Path, optional
        Folder of the trained members, where a killed run resumes; full members need it.
    cache_dir : str or Path, optional
        Folder of cached features and token states; None for no cache.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Retraining

    Raises
    ------
    OptionError
        If the ensemble was not made by training, or an option is out of range.
    DataError
        If there are no old pairs.
    TrainingError
        If training cannot continue.
    """
    require_pairs(old, "retraining")
    options = options or RetrainingOptions()
    request = replace(TrainingRequest.of(ensemble), seed=options.seed, out=out, cache_dir=cache_dir)
    if recipe is not None:
        request = replace(request, recipe=recipe)
    try:
        parts = sufficient_parts(judgments, old, options)
    except TooFewJudgmentsError as error:
        return Retraining(answer="too few", reason=str(error))
    details: dict[str, Any] = {"judgments": parts.judgments, "effective": parts.effective}
    pairs = Preferences((*old, *parts.train), f"{old.source} and {parts.train.source}")
    share = options.validation_share
    fit, validation = pairs.split(1 - share, share, seed=options.seed)
    trained = train_request(fit, validation, request, progress=progress)
    reference = old if reference is None else reference
    cache = None if cache_dir is None else FeatureCache(Path(cache_dir).expanduser())
    incumbent = _with_cache(ensemble, cache)
    candidate = same_units(_with_cache(trained, cache), incumbent, reference, progress=progress)
    details["units"] = _units(candidate, reference)
    result = _judge(incumbent, candidate, parts, options, details, progress)
    # The cache's folder belongs to this run, so published members must not refer to it.
    return replace(
        result,
        ensemble=result.ensemble and replace(result.ensemble, scorers=trained.scorers),
        candidate=result.candidate and replace(result.candidate, scorers=trained.scorers),
    )


def _with_cache(ensemble: RewardEnsemble, cache: FeatureCache | None) -> RewardEnsemble:
    """Let heads reuse the features cached by training, and share them."""
    scorers = (s.with_cache(cache) if isinstance(s, HeadScorer) else s for s in ensemble.scorers)
    return replace(ensemble, scorers=tuple(scorers))


def sufficient_parts(
    judgments: Sequence[Judgment], old: Preferences, options: RetrainingOptions
) -> RetrainingParts:
    """Split the judgments, and refuse parts with too few effective judgments.

    Raises
    ------
    TooFewJudgmentsError
        If calibration or gate has fewer effective judgments than `min_judgments`.
    """
    parts = split_judgments(
        judgments,
        old,
        gate_share=options.gate_share,
        calibration_share=options.calibration_share,
        weighted=options.weighted,
        seed=options.seed,
    )
    for name in ("calibration", "gate"):
        if parts.effective[name] < options.min_judgments:
            raise TooFewJudgmentsError(
                f"the {parts.judgments[name]} judgments of the {name} have an effective number of "
                f"{parts.effective[name]:.1f}; {options.min_judgments} are needed: collect more"
            )
    return parts


def _units(candidate: RewardEnsemble, reference: Preferences) -> dict[str, Any]:
    """Return mean and spread of the candidate's reward, which equal the incumbent's."""
    reward = candidate.score(reference.samples()).reward
    units = reward_units(reward, reference.sample_groups())
    return {
        "reference": reference.digest,
        "rms_within_prompts": units.scale[0],
        "mean": units.offset[0],
    }


def _judge(
    incumbent: RewardEnsemble,
    candidate: RewardEnsemble,
    parts: RetrainingParts,
    options: RetrainingOptions,
    details: dict[str, Any],
    progress: Progress,
) -> Retraining:
    held, aggregator = parts.calibration, incumbent.aggregator
    # Both temperatures from the same judgments, so that the gate compares members only.
    before = _incumbent_temperature(incumbent, incumbent.judge(held, progress=progress))
    try:
        after = _temperature(candidate.judge(held, progress=progress), aggregator)
    except CalibrationError as error:
        reason = f"the retrained members cannot be calibrated: {error}"
        return Retraining(answer="keep", reason=reason, candidate=candidate, details=details)
    details["temperatures"] = {"incumbent": before, "candidate": after}
    gate = gate_members(
        incumbent.judge(parts.gate, progress=progress),
        candidate.judge(parts.gate, progress=progress),
        aggregator,
        temperatures=(before, after),
        delta=options.delta,
        delta_accuracy=options.delta_accuracy,
        level=options.level,
    )
    result = Retraining(
        answer=gate.answer, reason=gate.reason, candidate=candidate, gate=gate, details=details
    )
    if gate.answer != "publish":
        return result
    try:
        calibrated = _calibrated(candidate, parts, incumbent.calibration, progress)
    except CalibrationError as error:
        reason = f"the retrained members cannot be calibrated: {error}"
        return replace(result, answer="keep", reason=reason)
    return replace(result, ensemble=calibrated)


def _temperature(scored: ScoredPairs, aggregator: Aggregator) -> float:
    return fit_temperature(
        scored.margins(aggregator),
        scored.targets,
        weights=scored.weights,
        groups=scored.groups,
        min_judgments=2,
    ).temperature


def _incumbent_temperature(incumbent: RewardEnsemble, scored: ScoredPairs) -> float:
    """Return the incumbent's temperature on these judgments, else its published one, else ∞."""
    try:
        return _temperature(scored, incumbent.aggregator)
    except CalibrationError:
        old = incumbent.calibration
        return math.inf if old is None else old.temperature


def _calibrated(
    candidate: RewardEnsemble,
    parts: RetrainingParts,
    old: Calibration | None,
    progress: Progress,
) -> RewardEnsemble:
    """Calibrate by the incumbent's method, on all judgments that no member was trained on."""
    # The gate has decided, so its judgments can be used for the final fit.
    held = Preferences((*parts.calibration, *parts.gate), parts.calibration.source)
    calibrated = candidate.calibrate(
        held,
        method="temperature" if old is None else old.method,
        slices=old is not None and bool(old.slices),
        min_judgments=2,
        progress=progress,
    )
    return replace(calibrated, provenance=candidate.provenance)
