"""Histogram binning: the share of wins in each of ten equal bins of σ(Δ/T), by netcal.

References
----------
.. [1] Zadrozny & Elkan 2001: obtaining calibrated probability estimates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibrator import CalibrationData, Calibrator
from ensemble_rm.calibration.methods.binning import StepCurve, fit_bins

BINS = 10


def _fit_netcal(p: Floats, labels: NDArray[np.int64]) -> tuple[Any, set[int]]:
    from netcal.binning import HistogramBinning

    return HistogramBinning(bins=BINS).fit(p, labels), {BINS}


def fit_histogram(data: CalibrationData) -> StepCurve:
    """Fit histogram binning [1]_; see `fit_bins` for the weights that it refuses."""
    return fit_bins(data, method="histogram", fit=_fit_netcal)


CALIBRATOR = Calibrator("histogram", StepCurve, fit_histogram)
