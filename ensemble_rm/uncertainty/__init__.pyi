from .disagreement import (
    PairUncertainty as PairUncertainty,
    member_std as member_std,
    split_uncertainty as split_uncertainty,
)
from .distance import FeatureSpace as FeatureSpace, fit_feature_space as fit_feature_space
