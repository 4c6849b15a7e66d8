"""Bayesian binning into quantiles (BBQ), averaged over numbers of bins, by netcal.

netcal's bins are of equal width. BBQ counts copied judgments, and both orientations of each, as
independent when it weighs the numbers of bins.

References
----------
.. [1] Naeini et al. 2015: obtaining well calibrated probabilities using Bayesian binning.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibrator import CalibrationData, Calibrator
from ensemble_rm.calibration.methods.binning import StepCurve, fit_bins


def _fit_netcal(p: Floats, labels: NDArray[np.int64]) -> tuple[Any, set[int]]:
    from netcal.binning import BBQ

    with contextlib.redirect_stderr(io.StringIO()):  # netcal draws a progress bar
        fitted = BBQ().fit(p, labels)
    return fitted, {model["bins"] for model in fitted.get_params(deep=True)["_binning_models"]}


def fit_bbq(data: CalibrationData) -> StepCurve:
    """Fit BBQ [1]_; see `fit_bins` for the weights that it refuses."""
    return fit_bins(data, method="bbq", fit=_fit_netcal)


CALIBRATOR = Calibrator("bbq", StepCurve, fit_bbq)
