"""`retrain`: an ensemble, its old pairs and new judgments → a candidate and a verdict.

Nothing is published here, and nothing of the incumbent is changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.methods.temperature import MIN_JUDGMENTS, fit_temperature
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.data.samples import Preferences, require_pairs
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import CalibrationError, OptionError, TooFewJudgmentsError
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.members.backbone.checkpoint import DEFAULT_CACHE
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.heads.scorer import HeadScorer
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.progress import Progress, silent
from ensemble_rm.retraining.gate import Answer, RetrainingGate, gate_members
from ensemble_rm.retraining.splits import RetrainingParts, part_judgments
from ensemble_rm.retraining.unit_matching import reward_units, same_units
from ensemble_rm.training.run import train
from ensemble_rm.training.start import training_arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainingOptions:
    """How a retraining is done and judged.

    Attributes
    ----------
    gate_share : float
        Of the judgments on new prompts, the newest, that are the gate's.
    calibration_share : float
        Of them, that set the temperatures.
    validation_share : float
        Of what is trained on, by prompt, that stops training early.
    weighted : bool
        Whether training counts judgments 1/π, too. Calibration and gate, which say something of
        all pairs, always do; members learn what depends on the pair itself, and there the weights
        cost more than they mend (``benchmarks/lifecycle/selection.py``).
    delta : float
        Rise of NLL that has to be excluded, nats a judgment.
    delta_accuracy : float
        Fall of accuracy that has to be excluded.
    level : float
        Of the one-sided bounds.
    min_judgments : int
        The fewest effective judgments to calibrate on, and to gate on.
    seed : int
        Of the deals and of training; keep it from one retraining to the next, and no incumbent has
        been trained on what calibrates.
    """

    gate_share: float = 0.25
    calibration_share: float = 0.25
    validation_share: float = 0.15
    weighted: bool = False
    delta: float = 0.02
    delta_accuracy: float = 0.05
    level: float = 0.95
    min_judgments: int = MIN_JUDGMENTS
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise OptionError(f"validation_share must lie in (0, 1), not {self.validation_share}")
        if not (self.delta > 0 and 0 < self.delta_accuracy < 1 and 0.5 <= self.level < 1):
            raise OptionError(
                f"delta={self.delta} must be > 0, delta_accuracy={self.delta_accuracy} in (0, 1) "
                f"and level={self.level} in [0.5, 1)"
            )

    def to_json(self) -> dict[str, Any]:
        """Return them by name."""
        return asdict(self)


@dataclass(frozen=True)
class Retraining:
    """What came of it.

    Attributes
    ----------
    answer : {"publish", "keep", "too few"}
    reason : str
        Why, in words.
    ensemble : RewardEnsemble, optional
        The candidate, in the incumbent's units and calibrated on calibration and gate; None unless
        it is to be published.
    candidate : RewardEnsemble, optional
        The retrained members in the incumbent's units, not calibrated; None where there was no
        training.
    gate : RetrainingGate, optional
        Where it came to that.
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
    """Train the members on, on old pairs and new judgments, and judge the result on the newest.

    Parameters
    ----------
    ensemble : RewardEnsemble
        The incumbent, made by `train` or by this function.
    old : Preferences
        What its members were trained on.
    judgments : sequence of Judgment
        The new ones, dated; votes become soft labels.
    reference : Preferences, optional
        The completions on which the reward's spread stays what it was; `old` where not given. Name
        the same ones each time.
    recipe : Recipe, optional
        The incumbent's own where not given.
    options : RetrainingOptions, optional
    out : str or Path, optional
        A folder for the trained members, where a killed run goes on; full members need it.
    cache_dir : str or Path, optional
        Of features and token states.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Retraining

    Raises
    ------
    OptionError
        If the ensemble does not come from training, or an option cannot be used.
    EmptyDataError
        If there are no old pairs.
    TrainingError
        If training cannot go on.
    """
    require_pairs(old, "retraining")
    chosen = options or RetrainingOptions()
    said = training_arguments(ensemble)
    if recipe is not None:
        said["recipe"] = recipe
    try:
        parts = deal(judgments, old, chosen)
    except TooFewJudgmentsError as error:
        return Retraining("too few", str(error))
    details: dict[str, Any] = {"judgments": parts.judgments, "effective": parts.effective}
    pairs = Preferences((*old, *parts.train), f"{old.source} and {parts.train.source}")
    fit, validation = pairs.split(
        1 - chosen.validation_share, chosen.validation_share, seed=chosen.seed
    )
    trained = train(
        fit,
        validation,
        **said,
        seed=chosen.seed,
        out=out,
        cache_dir=cache_dir,
        progress=progress,
    )
    fixed = old if reference is None else reference
    cache = None if cache_dir is None else FeatureCache(Path(cache_dir).expanduser())
    both = [_reading(one, cache) for one in (ensemble, trained)]
    candidate = same_units(both[1], both[0], fixed, progress=progress)
    details["units"] = _units(candidate, fixed)
    found = _judge(both[0], candidate, parts, chosen, details, progress)
    return replace(
        found,
        ensemble=found.ensemble and replace(found.ensemble, scorers=trained.scorers),
        candidate=found.candidate and replace(found.candidate, scorers=trained.scorers),
    )


def _reading(ensemble: RewardEnsemble, cache: FeatureCache | None) -> RewardEnsemble:
    """Let heads find the features that training has read, and each other's."""
    scorers = (s.with_cache(cache) if isinstance(s, HeadScorer) else s for s in ensemble.scorers)
    return replace(ensemble, scorers=tuple(scorers))


def deal(
    judgments: Sequence[Judgment], old: Preferences, options: RetrainingOptions
) -> RetrainingParts:
    """Deal the judgments, and refuse parts that say too little.

    Raises
    ------
    TooFewJudgmentsError
        If calibration or gate has fewer effective judgments than it needs.
    """
    parts = part_judgments(
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
                f"the {parts.judgments[name]} judgments of the {name} count as "
                f"{parts.effective[name]:.1f} drawn at random; {options.min_judgments} are needed: "
                "collect more"
            )
    return parts


def _units(candidate: RewardEnsemble, reference: Preferences) -> dict[str, Any]:
    """Say what the candidate's reward is spread like, which is as the incumbent's was."""
    reward = candidate.score(reference.samples()).reward
    found = reward_units(reward, reference.sample_groups())
    return {
        "reference": reference.digest,
        "rms_within_prompts": found.scale[0],
        "mean": found.offset[0],
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
    before = _temperature(incumbent.judge(held, progress=progress), incumbent)
    try:
        scored = candidate.judge(held, progress=progress)
        after = fit_temperature(
            scored.margins(aggregator),
            scored.targets,
            weights=scored.weights,
            groups=scored.groups,
            min_judgments=2,
        ).temperature
    except CalibrationError as error:
        reason = f"the retrained members cannot be calibrated: {error}"
        return Retraining("keep", reason, candidate=candidate, details=details)
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
    if gate.answer != "publish":
        return Retraining(gate.answer, gate.reason, None, candidate, gate, details)
    try:
        final = _calibrated(candidate, parts, incumbent.calibration, progress)
    except CalibrationError as error:
        reason = f"the retrained members cannot be calibrated: {error}"
        return Retraining("keep", reason, None, candidate, gate, details)
    return Retraining("publish", gate.reason, final, candidate, gate, details)


def _temperature(held: ScoredPairs, incumbent: RewardEnsemble) -> float:
    """Return the incumbent's temperature of these judgments; else its own; else infinity."""
    try:
        return fit_temperature(
            held.margins(incumbent.aggregator),
            held.targets,
            weights=held.weights,
            groups=held.groups,
            min_judgments=2,
        ).temperature
    except CalibrationError:
        old = incumbent.calibration
        return math.inf if old is None else old.temperature


def _calibrated(
    candidate: RewardEnsemble,
    parts: RetrainingParts,
    old: Calibration | None,
    progress: Progress,
) -> RewardEnsemble:
    """Calibrate as the incumbent was, on all judgments that no member was trained on."""
    held = Preferences((*parts.calibration, *parts.gate), parts.calibration.source)
    found = candidate.calibrate(
        held,
        method="temperature" if old is None else old.method,
        slices=old is not None and bool(old.slices),
        min_judgments=2,
        progress=progress,
    )
    return replace(found, provenance=candidate.provenance)
