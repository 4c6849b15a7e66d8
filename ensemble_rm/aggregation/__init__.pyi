from .aggregator import Aggregator as Aggregator, make_aggregator as make_aggregator
from .rule import (
    Coefficient as Coefficient,
    Rule as Rule,
    SortedScores as SortedScores,
    register as register,
)
from .rules.cvar import cvar as cvar
from .rules.entropic import entropic as entropic
from .rules.lcb import lcb as lcb
from .rules.mean import mean as mean
from .rules.median import median as median
from .rules.minimum import minimum as minimum
from .rules.quantile import quantile as quantile
from .rules.uwo import uwo as uwo
