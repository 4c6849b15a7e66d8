from .combining import combine as combine
from .results import Comparison as Comparison, Ranking as Ranking, Scores as Scores
from .reward_ensemble import RewardEnsemble as RewardEnsemble
from .streaming import stream_scores as stream_scores
from .weight_averaging import average_weights as average_weights
