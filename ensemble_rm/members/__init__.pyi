from .backbone.trunk import TrunkOptions as TrunkOptions, View as View
from .branches.scorer import BranchScorer as BranchScorer
from .comparator import Comparator as Comparator
from .full.scorer import ClassifierScorer as ClassifierScorer
from .heads.scorer import HeadScorer as HeadScorer
from .implicit import ImplicitScorer as ImplicitScorer
from .judges.asking import JudgeOptions as JudgeOptions
from .judges.comparator import JudgeComparator as JudgeComparator, JudgeVerdicts as JudgeVerdicts
from .judges.rubric import Rubric as Rubric, read_rubric as read_rubric
from .judges.scorer import JudgeScorer as JudgeScorer
from .judges.usage import Price as Price, Usage as Usage
from .learning.recipe import Recipe as Recipe
from .lora.adapters import LoraOptions as LoraOptions
from .lora.scorer import LoraScorer as LoraScorer
from .remote.client import ClientOptions as ClientOptions
from .remote.raw_logit_check import RawLogitReport as RawLogitReport
from .remote.scorer import RemoteScorer as RemoteScorer, RemoteScores as RemoteScores
from .scorer import (
    FunctionScorer as FunctionScorer,
    MemberScores as MemberScores,
    PendingScores as PendingScores,
    Scorer as Scorer,
    scorer_features as scorer_features,
)
