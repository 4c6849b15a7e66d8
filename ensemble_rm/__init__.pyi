from . import (
    active_learning as active_learning,
    aggregation as aggregation,
    best_of_n as best_of_n,
    calibration as calibration,
    data as data,
    drift as drift,
    ensemble as ensemble,
    errors as errors,
    evaluation as evaluation,
    judgments as judgments,
    members as members,
    metrics as metrics,
    recalibration as recalibration,
    retraining as retraining,
    rl as rl,
    scoring as scoring,
    server as server,
    training as training,
    uncertainty as uncertainty,
    versions as versions,
)
from .active_learning.selection import select_pairs as select_pairs
from .calibration.calibration import Calibration as Calibration
from .data.loading import load_preferences as load_preferences
from .data.samples import (
    Message as Message,
    Preference as Preference,
    Preferences as Preferences,
    Sample as Sample,
)
from .ensemble.combining import combine as combine
from .ensemble.results import Comparison as Comparison, Ranking as Ranking, Scores as Scores
from .ensemble.reward_ensemble import RewardEnsemble as RewardEnsemble
from .ensemble.streaming import stream_scores as stream_scores
from .ensemble.weight_averaging import average_weights as average_weights
from .evaluation.evaluation import evaluate as evaluate
from .judgments.imports.importing import import_judgments as import_judgments
from .judgments.judgment import Judgment as Judgment
from .judgments.store import JudgmentStore as JudgmentStore
from .members.backbone.options import TrunkOptions as TrunkOptions
from .members.backbone.trunk import View as View
from .members.scorer import FunctionScorer as FunctionScorer, Scorer as Scorer
from .recalibration.job import recalibrate as recalibrate
from .retraining.candidate import retrain as retrain
from .training.run import train as train
from .versions.repository import Versions as Versions

__version__: str
