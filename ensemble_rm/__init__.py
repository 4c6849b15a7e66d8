"""ensemble_rm: robust, calibrated rewards from ensembles of reward models.

Importing it loads neither torch nor transformers: each name brings what it needs at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensemble_rm.aggregation.aggregator import (
        Aggregator,
        cvar,
        entropic,
        lcb,
        make_aggregator,
        mean,
        median,
        minimum,
        quantile,
        uwo,
    )
    from ensemble_rm.bestofn import (
        CurveFit,
        best_of_n_curve,
        best_of_n_kl,
        best_of_n_weights,
        fit_curve,
    )
    from ensemble_rm.calibration.calibration import Calibration
    from ensemble_rm.calibration.normaliser import Normaliser, fit_normaliser
    from ensemble_rm.calibration.pairs import ScoredPairs
    from ensemble_rm.calibration.reliability import Reliability, fit_reliability
    from ensemble_rm.calibration.temperature import TemperatureFit, fit_temperature
    from ensemble_rm.calibration.ties import TieModel, fit_ties
    from ensemble_rm.combining import combine
    from ensemble_rm.distance import FeatureSpace, fit_feature_space
    from ensemble_rm.ensemble import RewardEnsemble
    from ensemble_rm.judgments.agreement import AgreementReport, agreement_report
    from ensemble_rm.judgments.exporting import export_judgments, judgment_dataset
    from ensemble_rm.judgments.importing import import_judgments
    from ensemble_rm.judgments.judgment import Judgment
    from ensemble_rm.judgments.rows import Imported, ImportOptions
    from ensemble_rm.judgments.selection import Selection
    from ensemble_rm.judgments.store import JudgmentStore
    from ensemble_rm.loading import load_preferences
    from ensemble_rm.members.adapters import LoraOptions
    from ensemble_rm.members.branches import BranchScorer
    from ensemble_rm.members.classifier import ClassifierScorer
    from ensemble_rm.members.comparator import Comparator
    from ensemble_rm.members.heads import HeadScorer
    from ensemble_rm.members.implicit import ImplicitScorer
    from ensemble_rm.members.judge import JudgeScorer
    from ensemble_rm.members.judging.asking import JudgeOptions
    from ensemble_rm.members.judging.comparator import JudgeComparator, JudgeVerdicts
    from ensemble_rm.members.judging.rubric import Rubric, read_rubric
    from ensemble_rm.members.judging.usage import Price, Usage
    from ensemble_rm.members.lora import LoraScorer
    from ensemble_rm.members.remote.client import ClientOptions
    from ensemble_rm.members.remote.scorer import RemoteScorer, RemoteScores
    from ensemble_rm.members.remote.self_test import SelfTestReport
    from ensemble_rm.members.score_cache import ScoreCache
    from ensemble_rm.members.scorer import (
        ElsewhereScorer,
        FeatureScorer,
        FunctionScorer,
        Scorer,
        scorer_features,
    )
    from ensemble_rm.members.trunk import TrunkOptions, View
    from ensemble_rm.merging import merge
    from ensemble_rm.recalibration.decision import GateOptions
    from ensemble_rm.recalibration.drift.anchors import anchor_votes
    from ensemble_rm.recalibration.drift.labelled import DriftTest, LabelledDrift
    from ensemble_rm.recalibration.drift.raters import AnchorVote, RaterDrift, rater_drift
    from ensemble_rm.recalibration.drift.reference import Reference
    from ensemble_rm.recalibration.drift.report import DriftReport
    from ensemble_rm.recalibration.drift.unlabelled import UnlabelledDrift, unlabelled_drift
    from ensemble_rm.recalibration.job import recalibrate
    from ensemble_rm.recalibration.outcome import Recalibration
    from ensemble_rm.recalibration.retraining import Retraining, RetrainingOptions, retrain
    from ensemble_rm.recalibration.retraining_job import RetrainingRun, retrain_run
    from ensemble_rm.recalibration.units import same_units
    from ensemble_rm.reports.drift import draw_drift, drift_text
    from ensemble_rm.reports.evaluation import Evaluation, evaluate
    from ensemble_rm.reports.precision import PrecisionReport, precision_report
    from ensemble_rm.results import Comparison, Ranking, Scores
    from ensemble_rm.rl.kl import AdaptiveKL, FixedKL, sequence_kl, shape_rewards
    from ensemble_rm.rl.monitor import OverOptimisationMonitor
    from ensemble_rm.rl.openrlhf import openrlhf_reward
    from ensemble_rm.rl.trl import reward_function
    from ensemble_rm.rl.verl import verl_reward
    from ensemble_rm.rl.watching import Alarm, AlarmRule, StepRecord
    from ensemble_rm.routing import (
        Routed,
        Saving,
        choose_threshold,
        pair_uncertainty,
        route,
        threshold_for_share,
    )
    from ensemble_rm.samples import Message, Preference, Preferences, Sample
    from ensemble_rm.sampling import Best, MadePair, best_of_n, make_pairs
    from ensemble_rm.selection.select import SelectedPair, SelectedPairs, select_pairs
    from ensemble_rm.selection.tasks import to_tasks
    from ensemble_rm.streaming import stream_scores
    from ensemble_rm.training.recipe import Recipe
    from ensemble_rm.training.train import train
    from ensemble_rm.versions.repository import Versions
    from ensemble_rm.versions.version import Version
    from ensemble_rm.weighting import (
        SampleWeights,
        effective_sample_size,
        inclusion_weights,
        thin_to_equal,
    )

__version__ = "0.1.0"

_HOMES = {
    "aggregation.aggregator": (
        "Aggregator cvar entropic lcb make_aggregator mean median minimum quantile uwo"
    ),
    "bestofn": "CurveFit best_of_n_curve best_of_n_kl best_of_n_weights fit_curve",
    "calibration.calibration": "Calibration",
    "calibration.normaliser": "Normaliser fit_normaliser",
    "calibration.pairs": "ScoredPairs",
    "calibration.reliability": "Reliability fit_reliability",
    "calibration.temperature": "TemperatureFit fit_temperature",
    "calibration.ties": "TieModel fit_ties",
    "combining": "combine",
    "distance": "FeatureSpace fit_feature_space",
    "ensemble": "RewardEnsemble",
    "judgments.agreement": "AgreementReport agreement_report",
    "judgments.exporting": "export_judgments judgment_dataset",
    "judgments.importing": "import_judgments",
    "judgments.judgment": "Judgment",
    "judgments.rows": "ImportOptions Imported",
    "judgments.selection": "Selection",
    "judgments.store": "JudgmentStore",
    "loading": "load_preferences",
    "members.adapters": "LoraOptions",
    "members.branches": "BranchScorer",
    "members.classifier": "ClassifierScorer",
    "members.comparator": "Comparator",
    "members.heads": "HeadScorer",
    "members.implicit": "ImplicitScorer",
    "members.judge": "JudgeScorer",
    "members.judging.asking": "JudgeOptions",
    "members.judging.comparator": "JudgeComparator JudgeVerdicts",
    "members.judging.rubric": "Rubric read_rubric",
    "members.judging.usage": "Price Usage",
    "members.lora": "LoraScorer",
    "members.remote.client": "ClientOptions",
    "members.remote.scorer": "RemoteScorer RemoteScores",
    "members.remote.self_test": "SelfTestReport",
    "members.score_cache": "ScoreCache",
    "members.scorer": "ElsewhereScorer FeatureScorer FunctionScorer Scorer scorer_features",
    "members.trunk": "TrunkOptions View",
    "merging": "merge",
    "recalibration.drift.anchors": "anchor_votes",
    "recalibration.decision": "GateOptions",
    "recalibration.job": "recalibrate",
    "recalibration.outcome": "Recalibration",
    "recalibration.drift.labelled": "DriftTest LabelledDrift",
    "recalibration.drift.raters": "AnchorVote RaterDrift rater_drift",
    "recalibration.drift.reference": "Reference",
    "recalibration.drift.report": "DriftReport",
    "recalibration.drift.unlabelled": "UnlabelledDrift unlabelled_drift",
    "reports.drift": "draw_drift drift_text",
    "recalibration.retraining": "Retraining RetrainingOptions retrain",
    "recalibration.retraining_job": "RetrainingRun retrain_run",
    "recalibration.units": "same_units",
    "reports.evaluation": "Evaluation evaluate",
    "reports.precision": "PrecisionReport precision_report",
    "results": "Comparison Ranking Scores",
    "rl.kl": "AdaptiveKL FixedKL sequence_kl shape_rewards",
    "rl.monitor": "OverOptimisationMonitor",
    "rl.openrlhf": "openrlhf_reward",
    "rl.trl": "reward_function",
    "rl.verl": "verl_reward",
    "rl.watching": "Alarm AlarmRule StepRecord",
    "routing": "Routed Saving choose_threshold pair_uncertainty route threshold_for_share",
    "samples": "Message Preference Preferences Sample",
    "selection.select": "SelectedPair SelectedPairs select_pairs",
    "selection.tasks": "to_tasks",
    "sampling": "Best MadePair best_of_n make_pairs",
    "streaming": "stream_scores",
    "training.recipe": "Recipe",
    "training.train": "train",
    "versions.repository": "Versions",
    "versions.version": "Version",
    "weighting": "SampleWeights effective_sample_size inclusion_weights thin_to_equal",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AdaptiveKL",
    "Aggregator",
    "AgreementReport",
    "Alarm",
    "AlarmRule",
    "AnchorVote",
    "Best",
    "BranchScorer",
    "Calibration",
    "ClassifierScorer",
    "ClientOptions",
    "Comparator",
    "Comparison",
    "CurveFit",
    "DriftReport",
    "DriftTest",
    "ElsewhereScorer",
    "Evaluation",
    "FeatureScorer",
    "FeatureSpace",
    "FixedKL",
    "FunctionScorer",
    "GateOptions",
    "HeadScorer",
    "ImplicitScorer",
    "ImportOptions",
    "Imported",
    "JudgeComparator",
    "JudgeOptions",
    "JudgeScorer",
    "JudgeVerdicts",
    "Judgment",
    "JudgmentStore",
    "LabelledDrift",
    "LoraOptions",
    "LoraScorer",
    "MadePair",
    "Message",
    "Normaliser",
    "OverOptimisationMonitor",
    "PrecisionReport",
    "Preference",
    "Preferences",
    "Price",
    "Ranking",
    "RaterDrift",
    "Recalibration",
    "Recipe",
    "Reference",
    "Reliability",
    "RemoteScorer",
    "RemoteScores",
    "Retraining",
    "RetrainingOptions",
    "RetrainingRun",
    "RewardEnsemble",
    "Routed",
    "Rubric",
    "Sample",
    "SampleWeights",
    "Saving",
    "ScoreCache",
    "ScoredPairs",
    "Scorer",
    "Scores",
    "SelectedPair",
    "SelectedPairs",
    "Selection",
    "SelfTestReport",
    "StepRecord",
    "TemperatureFit",
    "TieModel",
    "TrunkOptions",
    "UnlabelledDrift",
    "Usage",
    "Version",
    "Versions",
    "View",
    "__version__",
    "agreement_report",
    "anchor_votes",
    "best_of_n",
    "best_of_n_curve",
    "best_of_n_kl",
    "best_of_n_weights",
    "choose_threshold",
    "combine",
    "cvar",
    "draw_drift",
    "drift_text",
    "effective_sample_size",
    "entropic",
    "evaluate",
    "export_judgments",
    "fit_curve",
    "fit_feature_space",
    "fit_normaliser",
    "fit_reliability",
    "fit_temperature",
    "fit_ties",
    "import_judgments",
    "inclusion_weights",
    "judgment_dataset",
    "lcb",
    "load_preferences",
    "make_aggregator",
    "make_pairs",
    "mean",
    "median",
    "merge",
    "minimum",
    "openrlhf_reward",
    "pair_uncertainty",
    "precision_report",
    "quantile",
    "rater_drift",
    "read_rubric",
    "recalibrate",
    "retrain",
    "retrain_run",
    "reward_function",
    "route",
    "same_units",
    "scorer_features",
    "select_pairs",
    "sequence_kl",
    "shape_rewards",
    "stream_scores",
    "thin_to_equal",
    "threshold_for_share",
    "to_tasks",
    "train",
    "unlabelled_drift",
    "uwo",
    "verl_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ensemble_rm' has no attribute {name!r}")
    value = getattr(import_module(f"ensemble_rm.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
