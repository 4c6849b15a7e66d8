from .check import check_drift as check_drift, past_checks as past_checks
from .labelled import DriftTest as DriftTest, LabelledDrift as LabelledDrift
from .options import DriftCheckOptions as DriftCheckOptions
from .plots import draw_drift as draw_drift, drift_text as drift_text
from .raters import (
    AnchorVote as AnchorVote,
    RaterDrift as RaterDrift,
    anchor_votes as anchor_votes,
    rater_drift as rater_drift,
)
from .reference import Reference as Reference
from .report import DriftReport as DriftReport
from .unlabelled import UnlabelledDrift as UnlabelledDrift, unlabelled_drift as unlabelled_drift
