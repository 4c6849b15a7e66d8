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
    from ensemble_rm.calibration.temperature import TemperatureFit, fit_temperature
    from ensemble_rm.combining import combine
    from ensemble_rm.ensemble import RewardEnsemble
    from ensemble_rm.loading import load_preferences
    from ensemble_rm.members.adapters import LoraOptions
    from ensemble_rm.members.branches import BranchScorer
    from ensemble_rm.members.classifier import ClassifierScorer
    from ensemble_rm.members.heads import HeadScorer
    from ensemble_rm.members.implicit import ImplicitScorer
    from ensemble_rm.members.lora import LoraScorer
    from ensemble_rm.members.score_cache import ScoreCache
    from ensemble_rm.members.scorer import FunctionScorer, Scorer
    from ensemble_rm.members.trunk import TrunkOptions, View
    from ensemble_rm.merging import merge
    from ensemble_rm.reports.evaluation import Evaluation, evaluate
    from ensemble_rm.reports.precision import PrecisionReport, precision_report
    from ensemble_rm.results import Comparison, Ranking, Scores
    from ensemble_rm.rl.kl import AdaptiveKL, FixedKL, sequence_kl, shape_rewards
    from ensemble_rm.rl.monitor import OverOptimisationMonitor
    from ensemble_rm.rl.openrlhf import openrlhf_reward
    from ensemble_rm.rl.trl import reward_function
    from ensemble_rm.rl.verl import verl_reward
    from ensemble_rm.rl.watching import Alarm, AlarmRule, StepRecord
    from ensemble_rm.samples import Message, Preference, Preferences, Sample
    from ensemble_rm.sampling import Best, MadePair, best_of_n, make_pairs
    from ensemble_rm.streaming import stream_scores
    from ensemble_rm.training.recipe import Recipe
    from ensemble_rm.training.train import train

__version__ = "0.1.0"

_HOMES = {
    "aggregation.aggregator": (
        "Aggregator cvar entropic lcb make_aggregator mean median minimum quantile uwo"
    ),
    "bestofn": "CurveFit best_of_n_curve best_of_n_kl best_of_n_weights fit_curve",
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
    "members.implicit": "ImplicitScorer",
    "members.lora": "LoraScorer",
    "members.score_cache": "ScoreCache",
    "members.scorer": "FunctionScorer Scorer",
    "members.trunk": "TrunkOptions View",
    "merging": "merge",
    "reports.evaluation": "Evaluation evaluate",
    "reports.precision": "PrecisionReport precision_report",
    "results": "Comparison Ranking Scores",
    "rl.kl": "AdaptiveKL FixedKL sequence_kl shape_rewards",
    "rl.monitor": "OverOptimisationMonitor",
    "rl.openrlhf": "openrlhf_reward",
    "rl.trl": "reward_function",
    "rl.verl": "verl_reward",
    "rl.watching": "Alarm AlarmRule StepRecord",
    "samples": "Message Preference Preferences Sample",
    "sampling": "Best MadePair best_of_n make_pairs",
    "streaming": "stream_scores",
    "training.recipe": "Recipe",
    "training.train": "train",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AdaptiveKL",
    "Aggregator",
    "Alarm",
    "AlarmRule",
    "Best",
    "BranchScorer",
    "Calibration",
    "ClassifierScorer",
    "Comparison",
    "CurveFit",
    "Evaluation",
    "FixedKL",
    "FunctionScorer",
    "HeadScorer",
    "ImplicitScorer",
    "LoraOptions",
    "LoraScorer",
    "MadePair",
    "Message",
    "Normaliser",
    "OverOptimisationMonitor",
    "PrecisionReport",
    "Preference",
    "Preferences",
    "Ranking",
    "Recipe",
    "RewardEnsemble",
    "Sample",
    "ScoreCache",
    "ScoredPairs",
    "Scorer",
    "Scores",
    "StepRecord",
    "TemperatureFit",
    "TrunkOptions",
    "View",
    "__version__",
    "best_of_n",
    "best_of_n_curve",
    "best_of_n_kl",
    "best_of_n_weights",
    "combine",
    "cvar",
    "entropic",
    "evaluate",
    "fit_curve",
    "fit_normaliser",
    "fit_temperature",
    "lcb",
    "load_preferences",
    "make_aggregator",
    "make_pairs",
    "mean",
    "median",
    "merge",
    "minimum",
    "openrlhf_reward",
    "precision_report",
    "quantile",
    "reward_function",
    "sequence_kl",
    "shape_rewards",
    "stream_scores",
    "train",
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
