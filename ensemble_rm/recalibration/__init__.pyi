from .job import (
    Recalibration as Recalibration,
    recalibrate as recalibrate,
)
from .options import RecalibrationOptions as RecalibrationOptions
