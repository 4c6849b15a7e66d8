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
    from ensemble_rm.calibration.calibration import Calibration
    from ensemble_rm.calibration.normaliser import Normaliser, fit_normaliser
    from ensemble_rm.calibration.pairs import ScoredPairs
    from ensemble_rm.calibration.temperature import TemperatureFit, fit_temperature
    from ensemble_rm.combining import combine
    from ensemble_rm.ensemble import RewardEnsemble
    from ensemble_rm.loading import load_preferences
    from ensemble_rm.members.adapters import LoraOptions
    from ensemble_rm.members.branches import BranchScorer
    from ensemble_rm.members.classifier import ClassifierScorer
    from ensemble_rm.members.heads import HeadScorer
    from ensemble_rm.members.lora import LoraScorer
    from ensemble_rm.members.score_cache import ScoreCache
    from ensemble_rm.members.scorer import FunctionScorer, Scorer
    from ensemble_rm.members.trunk import TrunkOptions, View
    from ensemble_rm.merging import merge
    from ensemble_rm.recalibration.decision import GateOptions
    from ensemble_rm.recalibration.job import recalibrate
    from ensemble_rm.recalibration.outcome import Recalibration
    from ensemble_rm.recalibration.retraining import Retraining, RetrainingOptions, retrain
    from ensemble_rm.recalibration.retraining_job import RetrainingRun, retrain_run
    from ensemble_rm.recalibration.units import same_units
    from ensemble_rm.reports.evaluation import Evaluation, evaluate
    from ensemble_rm.reports.precision import PrecisionReport, precision_report
    from ensemble_rm.results import Comparison, Ranking, Scores
    from ensemble_rm.samples import Message, Preference, Preferences, Sample
    from ensemble_rm.selection.select import SelectedPair, SelectedPairs, select_pairs
    from ensemble_rm.selection.tasks import to_tasks
    from ensemble_rm.streaming import stream_scores
    from ensemble_rm.training.recipe import Recipe
    from ensemble_rm.training.train import train
    from ensemble_rm.versions.repository import Versions
    from ensemble_rm.versions.version import Version
    from ensemble_rm.weighting import (
        SampleWeights,
        effective_size,
        inclusion_weights,
        thin_to_equal,
    )

__version__ = "0.1.0"

_HOMES = {
    "aggregation.aggregator": (
        "Aggregator cvar entropic lcb make_aggregator mean median minimum quantile uwo"
    ),
    "calibration.calibration": "Calibration",
    "calibration.normaliser": "Normaliser fit_normaliser",
    "calibration.pairs": "ScoredPairs",
    "calibration.temperature": "TemperatureFit fit_temperature",
    "combining": "combine",
    "ensemble": "RewardEnsemble",
    "loading": "load_preferences",
    "members.adapters": "LoraOptions",
    "members.branches": "BranchScorer",
    "members.classifier": "ClassifierScorer",
    "members.heads": "HeadScorer",
    "members.lora": "LoraScorer",
    "members.score_cache": "ScoreCache",
    "members.scorer": "FunctionScorer Scorer",
    "members.trunk": "TrunkOptions View",
    "merging": "merge",
    "recalibration.decision": "GateOptions",
    "recalibration.job": "recalibrate",
    "recalibration.outcome": "Recalibration",
    "recalibration.retraining": "Retraining RetrainingOptions retrain",
    "recalibration.retraining_job": "RetrainingRun retrain_run",
    "recalibration.units": "same_units",
    "reports.evaluation": "Evaluation evaluate",
    "reports.precision": "PrecisionReport precision_report",
    "results": "Comparison Ranking Scores",
    "samples": "Message Preference Preferences Sample",
    "selection.select": "SelectedPair SelectedPairs select_pairs",
    "selection.tasks": "to_tasks",
    "streaming": "stream_scores",
    "training.recipe": "Recipe",
    "training.train": "train",
    "weighting": "SampleWeights effective_size inclusion_weights thin_to_equal",
    "versions.repository": "Versions",
    "versions.version": "Version",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Aggregator",
    "BranchScorer",
    "Calibration",
    "ClassifierScorer",
    "Comparison",
    "Evaluation",
    "FunctionScorer",
    "GateOptions",
    "HeadScorer",
    "LoraOptions",
    "LoraScorer",
    "Message",
    "Normaliser",
    "PrecisionReport",
    "Preference",
    "Preferences",
    "Ranking",
    "Recalibration",
    "Recipe",
    "Retraining",
    "RetrainingOptions",
    "RetrainingRun",
    "RewardEnsemble",
    "Sample",
    "SampleWeights",
    "ScoreCache",
    "ScoredPairs",
    "Scorer",
    "Scores",
    "SelectedPair",
    "SelectedPairs",
    "TemperatureFit",
    "TrunkOptions",
    "Version",
    "Versions",
    "View",
    "__version__",
    "combine",
    "cvar",
    "effective_size",
    "entropic",
    "evaluate",
    "fit_normaliser",
    "fit_temperature",
    "inclusion_weights",
    "lcb",
    "load_preferences",
    "make_aggregator",
    "mean",
    "median",
    "merge",
    "minimum",
    "precision_report",
    "quantile",
    "recalibrate",
    "retrain",
    "retrain_run",
    "same_units",
    "select_pairs",
    "stream_scores",
    "thin_to_equal",
    "to_tasks",
    "train",
    "uwo",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ensemble_rm' has no attribute {name!r}")
    value = getattr(import_module(f"ensemble_rm.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
