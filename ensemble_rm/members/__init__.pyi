from .backbone.options import TrunkOptions as TrunkOptions
from .backbone.trunk import View as View
from .branches.recipe import BranchRecipe as BranchRecipe
from .branches.scorer import BranchScorer as BranchScorer
from .comparator import Comparator as Comparator
from .full.recipe import FullRecipe as FullRecipe
from .full.scorer import FullScorer as FullScorer
from .heads.recipe import HeadRecipe as HeadRecipe
from .heads.scorer import HeadScorer as HeadScorer
from .implicit import ImplicitScorer as ImplicitScorer
from .judges.asking import JudgeOptions as JudgeOptions
from .judges.comparator import JudgeComparator as JudgeComparator, JudgeVerdicts as JudgeVerdicts
from .judges.rubric import Rubric as Rubric, read_rubric as read_rubric
from .judges.scorer import JudgeScorer as JudgeScorer
from .judges.usage import Price as Price, Usage as Usage
from .learning.recipe import Recipe as Recipe
from .lora.recipe import LoraOptions as LoraOptions, LoraRecipe as LoraRecipe
from .lora.scorer import LoraScorer as LoraScorer
from .registry import (
    MemberKind as MemberKind,
    make_recipe as make_recipe,
    member_kind as member_kind,
    register_kind as register_kind,
    trained_kinds as trained_kinds,
)
from .remote.client import ClientOptions as ClientOptions
from .remote.raw_logit_check import RawLogitReport as RawLogitReport
from .remote.scorer import RemoteScorer as RemoteScorer
from .scorer import (
    FunctionScorer as FunctionScorer,
    MemberScores as MemberScores,
    PendingScores as PendingScores,
    Scorer as Scorer,
    ScorerLike as ScorerLike,
    scorer_features as scorer_features,
)
