"""RewardEnsemble: scorers side by side, a normaliser, an aggregator and a calibration.

Immutable: what changes something returns the changed ensemble.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.calibration import (
    Calibration,
    fit_calibration,
    refit_calibration,
    require_calibration,
)
from ensemble_rm.calibration.methods.temperature import MIN_JUDGMENTS
from ensemble_rm.calibration.normaliser import Normaliser
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.data.samples import Preferences, Prompt, Sample, grouped_samples, require_pairs
from ensemble_rm.ensemble.results import Comparison, Ranking, Scores, compare_scored
from ensemble_rm.ensemble.stored import Origin, Stored
from ensemble_rm.errors import NoFeaturesError, OptionError
from ensemble_rm.members.encoding import Truncation
from ensemble_rm.members.scorer import Scorer, as_scorer, with_tokens
from ensemble_rm.progress import Progress, silent
from ensemble_rm.scoring.baselines import score_with_references
from ensemble_rm.scoring.features import features_in_chunks, score_and_features
from ensemble_rm.scoring.model_pool import ModelPool
from ensemble_rm.scoring.pipeline import score_all
from ensemble_rm.scoring.score_cache import ScoreCache
from ensemble_rm.uncertainty.distance import FeatureSpace


@dataclass(frozen=True, eq=False)
class RewardEnsemble(Stored):
    """Several reward models behind one aggregator, calibrated.

    Parameters
    ----------
    scorers : sequence of Scorer
        Or any objects with `names` and `score(samples) -> (n_samples, n_members)`.
    normaliser : Normaliser
        One offset and scale a member.
    aggregator : Aggregator
        Members' scores to one reward. Its weights, where it has any, name exactly the members.
    calibration : Calibration, optional
        Fitted by `calibrate`.
    provenance : dict
        Recipe, digests and versions, as training recorded them.
    score_cache : ScoreCache, optional
        Where raw scores are kept; see `with_score_cache`.
    model_pool : ModelPool, optional
        How many members' models are in memory at once; see `with_max_loaded_models`.
    origin : Origin, optional
        Where it was read, and which version it is; see `refresh`.
    feature_space : FeatureSpace, optional
        Where the features of the training inputs lie; see `distance`.
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
        object.__setattr__(self, "scorers", tuple(map(as_scorer, self.scorers)))
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
        """The members' names, in the order of the columns."""
        return tuple(name for scorer in self.scorers for name in scorer.names)

    # Scoring -----------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample], *, progress: Progress = silent) -> Scores:
        """Score samples with every member and aggregate.

        Parameters
        ----------
        samples : sequence of Sample
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
            If the normaliser has a baseline and a sample names no reference completion.
        """
        raw, members, cut = self.score_members(samples, progress=progress)
        return Scores(self.names, members, raw, self.aggregator(members), cut)

    def score_members(
        self, samples: Sequence[Sample], *, progress: Progress = silent
    ) -> tuple[Floats, Floats, Truncation]:
        """Return raw and normalised scores, NaN where one is missing, and what was cut."""
        options: dict[str, Any] = {"cache": self.score_cache, "pool": self.model_pool}
        below = None
        if self.normaliser.baseline:
            raw, below, cut = score_with_references(
                self.scorers, samples, **options, progress=progress
            )
        else:
            raw, cut = score_all(self.scorers, samples, **options, progress=progress)
        return raw, self.normaliser(raw, below), cut

    def distance(self, samples: Sequence[Sample], *, progress: Progress = silent) -> Floats:
        """Return how far samples lie from the training inputs, by the members' features.

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
        NoFeaturesError
            If no feature space was kept at training: no member exposes features, or the ensemble
            was not trained by this library.
        """
        if self.feature_space is None:
            raise NoFeaturesError(
                "the ensemble has no feature space: no member exposes features, or none was kept; "
                "fit one with fit_feature_space(scorer_features(ensemble.scorers, training))"
            )
        parts = features_in_chunks(self.scorers, samples, pool=self.model_pool, progress=progress)
        return np.concatenate([self.feature_space.distance(features) for features in parts])

    def members_with_distance(
        self, samples: Sequence[Sample], *, progress: Progress = silent
    ) -> tuple[Floats, Floats | None]:
        """Return normalised scores without a reward, and distances; None without features.

        Returns
        -------
        members : ndarray, shape (n_samples, n_members)
            NaN where a member has no score, whatever the aggregator makes of it.
        distance : ndarray, shape (n_samples,), optional
        """
        space = self.feature_space
        if space is None:
            return self.score_members(samples, progress=progress)[1], None
        if self.normaliser.baseline or self.score_cache is not None:
            return self.score_members(samples, progress=progress)[1], self.distance(samples)
        parts = score_and_features(self.scorers, samples, pool=self.model_pool, progress=progress)
        read = [(raw, space.distance(features)) for raw, _, features in parts]
        raw, far = (np.concatenate(one) for one in zip(*read, strict=True))
        return self.normaliser(raw, None), far

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
        """Say with what probability a human prefers each first completion.

        Parameters
        ----------
        prompts : sequence of str or of messages
            One a pair.
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
            One a prompt.
        """
        samples = grouped_samples(prompts, completions, references)
        reward = self.score(samples, progress=progress).reward
        ends = np.cumsum([len(texts) for texts in completions])[:-1]
        parts = np.split(reward, ends) if len(completions) else []
        return [Ranking(np.argsort(-part, kind="stable"), part) for part in parts]

    # Calibration -------------------------------------------------------------------------------

    def judge(self, pairs: Preferences, *, progress: Progress = silent) -> ScoredPairs:
        """Score both sides of judged pairs.

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
        members, far = self.members_with_distance(pairs.samples(), progress=progress)
        n = len(pairs)
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
        """Fit how the reward's margin becomes a probability, on judgments held apart.

        The reward itself stays as it is under every method.

        Parameters
        ----------
        held : Preferences
            Judgments that no member was trained on.
        aggregator : Aggregator, optional
            Of the reward from now on; the ensemble's own where not given.
        method : str
            ``"temperature"``, ``"power"``, ``"isotonic"``, ``"histogram"`` or ``"bbq"``; the last
            three make ties, and are never for an RL reward.
        slices : bool
            Whether each subset gets a temperature of its own, shrunk towards the global one.
        ties : str, optional
            Model the ties beside it: ``"davidson"`` or ``"rao-kupper"``.
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
        TooFewJudgmentsError, SeparableError, NoPositiveTemperatureError, NoTiesError
            Where no temperature or tie model can be fitted; see `fit_temperature`.
        OptionError
            If the method is unknown, cannot take these votes and weights, or is asked for slices.
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

    def with_aggregator(self, aggregator: Aggregator) -> RewardEnsemble:
        """Take another aggregator for rewards; a calibration of the old one no longer applies."""
        return replace(self, aggregator=aggregator)

    def with_score_cache(self, cache: ScoreCache | None) -> RewardEnsemble:
        """Keep members' raw scores on disk and read them there; None, the default, does neither."""
        return replace(self, score_cache=cache)

    def with_tokens(self, tokens: Mapping[str, str | Callable[[], str]]) -> RewardEnsemble:
        """Let members on other servers in: bearer tokens by member, which are never saved.

        Parameters
        ----------
        tokens : mapping of str to str or callable
            By the member's name: a token, or what returns the one that holds now.

        Raises
        ------
        OptionError
            If a name is none of a member on another server.
        """
        return replace(self, scorers=with_tokens(self.scorers, tokens))

    def with_max_loaded_models(self, n: int | None) -> RewardEnsemble:
        """Hold at most n scorers' models in memory, the others unloaded; all where n is None.

        A whole model is one, and so is a trunk with all its heads, branches or adapters. Each
        scores every sample of a call before it makes room for the next. The new ensemble loads
        models of its own; those of this one are freed with it.

        Raises
        ------
        OptionError
            If n is less than 1.
        """
        if n is None:
            return replace(self, model_pool=None)
        return replace(
            self, scorers=tuple(s.unloaded() for s in self.scorers), model_pool=ModelPool(n)
        )
