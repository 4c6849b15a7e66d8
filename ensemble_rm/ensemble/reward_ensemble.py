"""RewardEnsemble: members, a normaliser, an aggregator and a calibration.

Immutable: a method that changes something returns the changed ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibration import (
    Calibration,
    fit_calibration,
    refit_calibration,
    require_calibration,
)
from ensemble_rm.calibration.limits import MIN_JUDGMENTS
from ensemble_rm.calibration.normaliser import Normaliser
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.data.samples import Preferences, Prompt, Sample, grouped_samples, require_pairs
from ensemble_rm.ensemble import storage
from ensemble_rm.ensemble.results import (
    Comparison,
    Ranking,
    Scores,
    aggregate_recorded,
    compare_scored,
)
from ensemble_rm.errors import OptionError, ScoringError
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.scorer import Scorer, Token, as_scorer, with_tokens, with_tokens_of
from ensemble_rm.progress import Progress, silent
from ensemble_rm.scoring.model_pool import ModelPool
from ensemble_rm.scoring.pipeline import OnError, feature_distance, score_members
from ensemble_rm.scoring.score_cache import ScoreCache
from ensemble_rm.uncertainty.distance import FeatureSpace
from ensemble_rm.versions.version import Located, locate


@dataclass(frozen=True, slots=True)
class Origin:
    """The folder that an ensemble was loaded from.

    Attributes
    ----------
    folder : Path
        As it was given.
    version, members : int, optional
        Number of the version, and of the version that holds its members; None without versions.
    fixed : bool
        Whether the version was asked for by number: `refresh` then never leaves it.
    options : dict
        Arguments of `from_pretrained`, for loading another version in the same way.
    """

    folder: Path
    version: int | None
    members: int | None
    fixed: bool
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RewardEnsemble:
    """Several reward models as one calibrated reward.

    Parameters
    ----------
    scorers : sequence of Scorer
        Or of any objects with `names` and `score(samples) -> (n_samples, n_members)`.
    normaliser : Normaliser
        One offset and scale per member.
    aggregator : Aggregator
        Combines the members' scores. Its weights, where it has any, name exactly the members.
    calibration : Calibration, optional
        Fitted by `calibrate`.
    provenance : dict
        Recipe, digests and versions, as training recorded them.
    score_cache : ScoreCache, optional
        Stores raw scores; see `with_score_cache`.
    model_pool : ModelPool, optional
        Limits the models in memory; see `with_max_loaded_models`.
    origin : Origin, optional
        Folder and version that it was loaded from; see `refresh`.
    feature_space : FeatureSpace, optional
        Describes the features of the training inputs; see `distance`.

    Raises
    ------
    OptionError
        If there is no member, two members have one name, a member has no `names` or `score`, or
        the normaliser or the aggregator's weights are those of other members.
    """

    scorers: tuple[Scorer, ...]
    normaliser: Normaliser
    aggregator: Aggregator
    calibration: Calibration | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    score_cache: ScoreCache | None = None
    model_pool: ModelPool | None = None
    origin: Origin | None = None
    feature_space: FeatureSpace | None = None

    def __post_init__(self) -> None:
        scorers = tuple(map(as_scorer, self.scorers))
        if scorers != self.scorers:  # a copy keeps the very tuple: its models are loaded
            object.__setattr__(self, "scorers", scorers)
        k = len(self.names)
        if k == 0:
            raise OptionError("an ensemble needs at least one member")
        if len(set(self.names)) < k:
            raise OptionError(f"members' names must differ: {self.names}")
        if len(self.normaliser.offset) != k:
            raise OptionError(f"a normaliser of {len(self.normaliser.offset)} for {k} members")
        object.__setattr__(self, "aggregator", self.aggregator.bind(self.names))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members, in the order of the columns."""
        return tuple(name for scorer in self.scorers for name in scorer.names)

    # Scoring -----------------------------------------------------------------------------------

    def score(
        self,
        samples: Sequence[Sample],
        *,
        distance: bool = False,
        on_error: OnError = "raise",
        progress: Progress = silent,
    ) -> Scores:
        """Score samples with every member and aggregate.

        Parameters
        ----------
        samples : sequence of Sample
        distance : bool
            Whether to return the samples' distances to the training inputs, too; see `distance`.
        on_error : {"raise", "record"}
            Whether the first error is raised, or a sample that cannot be scored fails alone: its
            row is NaN, and the reason is in `Scores.errors`.
        progress : callable
            Called with (stage, done, total).

        Returns
        -------
        Scores

        Raises
        ------
        NonFiniteScoreError
            If a member's score is infinite, or NaN against the aggregator's policy.
        BaselineError
            If the normaliser has a baseline and a sample has no reference completion.
        ScoringError
            If distances are asked for and there is no feature space.
        """
        result = score_members(
            self.scorers,
            samples,
            baseline=self.normaliser.baseline,
            space=self._space() if distance else None,
            cache=self.score_cache,
            pool=self.model_pool,
            on_error=on_error,
            progress=progress,
        )
        members = self.normaliser(result.raw, result.baseline)
        if on_error == "record":
            return aggregate_recorded(self.names, result, members, self.aggregator)
        reward = self.aggregator(members)
        cut, errors = result.truncation, result.errors
        return Scores(self.names, members, result.raw, reward, cut, errors, result.distance)

    def distance(self, samples: Sequence[Sample], *, progress: Progress = silent) -> Floats:
        """Return how far samples are from the training inputs, by the members' features.

        Parameters
        ----------
        samples : sequence of Sample
        progress : callable
            Called with (stage, done, total).

        Returns
        -------
        ndarray, shape (n_samples,)
            Mahalanobis distance, about 1 on training inputs; see `FeatureSpace`.

        Raises
        ------
        ScoringError
            If there is no feature space: no member has features, or this library did not train
            the ensemble.
        """
        return feature_distance(
            self.scorers, samples, self._space(), pool=self.model_pool, progress=progress
        )

    def _space(self) -> FeatureSpace:
        if self.feature_space is None:
            raise ScoringError(
                "the ensemble has no feature space: no member has features, or none was kept; "
                "fit one with fit_feature_space(scorer_features(ensemble.scorers, training))"
            )
        return self.feature_space

    def compare(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[str],
        second: Sequence[str],
        *,
        subsets: Sequence[str | None] | None = None,
        references: Sequence[str | None] | None = None,
        aggregator: Aggregator | None = None,
        progress: Progress = silent,
    ) -> Comparison:
        """Return the probability that a human prefers each first completion.

        Parameters
        ----------
        prompts : sequence of str or of messages
            One per pair.
        first, second : sequence of str
            The completions.
        subsets : sequence of (str or None), optional
            Slice of each pair: its temperature is used where the calibration has it, the global
            one where it is None or unknown.
        references : sequence of (str or None), optional
            Reference completion of each prompt; a normaliser with a baseline needs them.
        aggregator : Aggregator, optional
            Must be the calibrated one, which is the default.
        progress : callable
            Called with (stage, done, total).

        Returns
        -------
        Comparison

        Raises
        ------
        NotCalibratedError
            If there is no calibration.
        AggregatorMismatchError
            If the calibration belongs to another aggregator.
        """
        chosen = (aggregator or self.aggregator).bind(self.names)
        calibration = require_calibration(self.calibration, chosen)
        if not len(prompts) == len(first) == len(second):
            raise OptionError(
                f"{len(prompts)} prompts, {len(first)} first and {len(second)} second completions"
            )
        if subsets is not None and len(subsets) != len(prompts):
            raise OptionError(f"{len(subsets)} subsets for {len(prompts)} pairs")
        sides = list(zip(first, second, strict=True))
        scores = self.score(grouped_samples(prompts, sides, references), progress=progress)
        return compare_scored(calibration, scores.reward, scores.members, subsets=subsets)

    def rank(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[str]],
        *,
        references: Sequence[str | None] | None = None,
        progress: Progress = silent,
    ) -> list[Ranking]:
        """Rank the completions of each prompt by reward.

        Parameters
        ----------
        prompts : sequence of str or of messages
        completions : sequence of sequence of str
            Those of each prompt; their numbers may differ.
        references : sequence of (str or None), optional
            Reference completion of each prompt; a normaliser with a baseline needs them.
        progress : callable
            Called with (stage, done, total).

        Returns
        -------
        list of Ranking
            One per prompt.
        """
        samples = grouped_samples(prompts, completions, references)
        reward = self.score(samples, progress=progress).reward
        ends = np.cumsum([len(texts) for texts in completions])[:-1]
        parts = np.split(reward, ends) if len(completions) else []
        return [Ranking(np.argsort(-part, kind="stable"), part) for part in parts]

    # Calibration -------------------------------------------------------------------------------

    def judge(self, pairs: Preferences, *, progress: Progress = silent) -> ScoredPairs:
        """Score both sides of judged pairs, and take their distances where there are features.

        A missing score stays NaN, whatever the aggregator's policy.

        Parameters
        ----------
        pairs : Preferences
        progress : callable
            Called with (stage, done, total).

        Returns
        -------
        ScoredPairs
            In the order of the pairs.
        """
        result = score_members(
            self.scorers,
            pairs.samples(),
            baseline=self.normaliser.baseline,
            space=self.feature_space,
            cache=self.score_cache,
            pool=self.model_pool,
            progress=progress,
        )
        members = self.normaliser(result.raw, result.baseline)
        n, far = len(pairs), result.distance
        verdicts = (pairs.targets, pairs.weights, pairs.groups, pairs.subsets, pairs.tie_shares)
        distances = np.zeros((n, 0)) if far is None else far.reshape(2, n).T
        return ScoredPairs(members[:n], members[n:], *verdicts, distances)

    def calibrate(
        self,
        held: Preferences,
        *,
        aggregator: Aggregator | None = None,
        method: str = "temperature",
        slices: bool = False,
        ties: str | None = None,
        min_judgments: int = MIN_JUDGMENTS,
        progress: Progress = silent,
    ) -> RewardEnsemble:
        """Fit how the reward's margin becomes a probability, on held-out judgments.

        The reward itself stays the same under every method.

        Parameters
        ----------
        held : Preferences
            Judgments that no member was trained on.
        aggregator : Aggregator, optional
            Of the reward from now on (default: the ensemble's own).
        method : str
            ``"temperature"``, ``"power"``, ``"isotonic"``, ``"histogram"`` or ``"bbq"``; the last
            three make ties, and are never for an RL reward.
        slices : bool
            Whether each subset gets a temperature of its own, shrunk towards the global one.
        ties : str, optional
            Tie model to fit, too: ``"davidson"`` or ``"rao-kupper"``.
        min_judgments : int
            The fewest that suffice.
        progress : callable
            Called with (stage, done, total).

        Returns
        -------
        RewardEnsemble
            A new one.

        Raises
        ------
        TooFewJudgmentsError, SeparableError, NoPositiveTemperatureError, CalibrationError
            Where no temperature or tie model can be fitted; see `fit_temperature`.
        OptionError
            If the method is unknown, cannot take these votes and weights, or has no slices.
        """
        require_pairs(held, "calibration")
        chosen = (aggregator or self.aggregator).bind(self.names)
        calibration = fit_calibration(
            self.judge(held, progress=progress),
            chosen,
            method=method,
            slices=slices,
            ties=ties,
            digest=held.digest,
            min_judgments=min_judgments,
        )
        return replace(self, aggregator=chosen, calibration=calibration)

    def recalibrate(self, aggregator: Aggregator) -> RewardEnsemble:
        """Take another aggregator, and calibrate it by the same method on the same judgments.

        Parameters
        ----------
        aggregator : Aggregator
            Of the reward from now on.

        Returns
        -------
        RewardEnsemble
            A new one; nothing is scored again.

        Raises
        ------
        NotCalibratedError
            If there is no calibration, or its judgments' scores were not kept.
        """
        aggregator = aggregator.bind(self.names)
        calibration = refit_calibration(self.calibration, aggregator)
        return replace(self, aggregator=aggregator, calibration=calibration)

    # Changed copies ----------------------------------------------------------------------------

    def with_aggregator(self, aggregator: Aggregator) -> RewardEnsemble:
        """Take another aggregator for rewards; a calibration of the old one no longer applies."""
        return replace(self, aggregator=aggregator)

    def with_score_cache(self, cache: ScoreCache | None) -> RewardEnsemble:
        """Store members' raw scores on disk and read them from there; None does neither."""
        return replace(self, score_cache=cache)

    def with_tokens(self, tokens: Mapping[str, Token]) -> RewardEnsemble:
        """Set bearer tokens of members on other servers; they are never saved.

        Parameters
        ----------
        tokens : mapping of str to str or callable
            By the member's name: a token, or a function that returns the current one.

        Raises
        ------
        OptionError
            If a name belongs to no member on another server.
        """
        return replace(self, scorers=with_tokens(self.scorers, tokens))

    def with_max_loaded_models(self, n: int | None) -> RewardEnsemble:
        """Limit the models in memory to n at once; None removes the limit.

        A whole model counts as one, and so does a trunk with all its heads, branches or adapters.
        Each scores every sample of a call before another takes its place. The new ensemble loads
        its own models; those of this one are freed with it.

        Raises
        ------
        OptionError
            If n is less than 1.
        """
        if n is None:
            return replace(self, model_pool=None)
        scorers = tuple(scorer.unloaded() for scorer in self.scorers)
        return replace(self, scorers=scorers, model_pool=ModelPool(n))

    # Storage -----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the ensemble as safetensors and JSON.

        Parameters
        ----------
        folder : str or Path
            Replaced as a whole if it contains an ensemble already.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        StorageError
            If a member cannot be saved, or the folder contains something else.
        VersionError
            If the folder contains versions.
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
        """Load what `save_pretrained` wrote, or a version of it; the scores are identical.

        Parameters
        ----------
        folder : str or Path
            Of an ensemble or of its versions.
        version : int, optional
            Number of a version (default: the pinned or else the current one).
        backbone : str or Path, optional
            Where the backbone is now, if it has moved since training.
        device : str, optional
            Device of the models (default: the best available).
        cache_dir : str or Path, optional
            For converted GGUF weights.
        max_loaded_models : int, optional
            Maximum number of models in memory; see `with_max_loaded_models`.

        Returns
        -------
        RewardEnsemble

        Raises
        ------
        StorageError
            If the folder contains no ensemble.
        VersionError
            If it has no version of that number.
        ModelError
            If the backbone's weights are not those of training.
        """
        path = Path(folder).expanduser()
        options = {
            "backbone": backbone,
            "device": device,
            "cache_dir": cache_dir,
            "max_loaded_models": max_loaded_models,
        }
        return cls._load(path, locate(path, version), fixed=version is not None, options=options)

    @classmethod
    def _load(cls, folder: Path, located: Located, *, fixed: bool, options: dict[str, Any]) -> Self:
        cache_dir = options["cache_dir"]
        parts = storage.load(
            located.ensemble,
            backbone=options["backbone"],
            device=options["device"],
            cache_dir=None if cache_dir is None else Path(cache_dir),
        )
        if located.calibration is not None:
            parts["calibration"] = located.calibration
        number = None if located.version is None else located.version.number
        members = None if located.version is None else located.version.ensemble
        loaded = cls(**parts, origin=Origin(folder, number, members, fixed, options))
        if (limit := options["max_loaded_models"]) is None:
            return loaded
        return replace(loaded, model_pool=ModelPool(limit))

    def refresh(self) -> Self:
        """Return the version that is current now, or this very ensemble if it is that version.

        Nothing is changed in place: the owner of the ensemble decides when to use the new one. The
        aggregator, with its λ, κ or β, stays that of this ensemble. Under a new calibration every
        reward is bitwise the same, and no model is loaded again.

        Returns
        -------
        RewardEnsemble
            This one, too, if it was not loaded from a folder, or was asked for by number.

        Raises
        ------
        StorageError
            If the current version cannot be read.
        """
        origin = self.origin
        if origin is None or origin.fixed:
            return self
        located = locate(origin.folder)
        version = located.version
        if version is None or version.number == origin.version:
            return self
        # A plain ensemble's members are those of the first version, which was made from it.
        if version.ensemble == (origin.members or 1):
            moved = replace(origin, version=version.number, members=version.ensemble)
            calibration = located.calibration or version.read_calibration()
            return replace(self, calibration=calibration, origin=moved)
        new = self._load(origin.folder, located, fixed=False, options=origin.options)
        # Tokens are never saved, so that the new members take those of the old.
        return replace(
            new,
            aggregator=self.aggregator,
            score_cache=self.score_cache,
            scorers=with_tokens_of(new.scorers, self.scorers),
        )
