from .candidate import (
    Retraining as Retraining,
    RetrainingOptions as RetrainingOptions,
    retrain as retrain,
)
from .job import (
    RetrainingRun as RetrainingRun,
    RetrainingRunOptions as RetrainingRunOptions,
    retrain_run as retrain_run,
)
from .unit_matching import same_units as same_units
