from .job import (
    Recalibration as Recalibration,
    RecalibrationOptions as RecalibrationOptions,
    recalibrate as recalibrate,
)
