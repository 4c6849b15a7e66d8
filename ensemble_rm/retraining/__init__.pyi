from .candidate import (
    Retraining as Retraining,
    retrain as retrain,
)
from .job import (
    RetrainingRun as RetrainingRun,
    retrain_run as retrain_run,
)
from .options import (
    RetrainingOptions as RetrainingOptions,
    RetrainingRunOptions as RetrainingRunOptions,
)
from .unit_matching import same_units as same_units
