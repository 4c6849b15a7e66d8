"""The slope 1/T of dated judgments, where they may hardly follow their margins, or contradict them.

The likelihood of a slope β has its maximum at any real number; a temperature needs one above 0.
Below 0 it is that of the turned margins, with its sign. What is known of a slope that has to be
positive is then the normal of that estimate, cut off at 0, with the mean and the variance [1]_

    β̃ = β + s·h,   var = s²(1 − h(h + β/s)),   h = φ(β/s)/Φ(β/s)

where s is the standard error over prompts. Far above 0 it is the estimate itself; near 0 and below
it is a small slope that says "nearly a coin", with a standard error of log T of about 1, where the
estimate alone would be no temperature, or one so large and uncertain that it counts for nothing.

References
----------
.. [1] Johnson, Kotz & Balakrishnan 1994, Continuous Univariate Distributions 1, 13.10.1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from scipy.stats import truncnorm

from ensemble_rm.calibration.methods.temperature import TemperatureFit, fit_temperature, margin_nll
from ensemble_rm.errors import NoPositiveTemperatureError
from ensemble_rm.evidence.dated_margins import DatedMargins

SURE = 6.0  # standard errors above 0, from which nothing is cut off: h < 1e-8
LOWEST = -50.0  # the same below 0, from which nothing changes but the rounding errors


def fit_signed(data: DatedMargins) -> tuple[float, TemperatureFit]:
    """Return the slope of the largest likelihood, and the fit of its absolute value.

    Raises
    ------
    TooFewJudgmentsError
        If fewer than two judgments have a margin.
    SeparableError
        If every judgment agrees with its margin, or every one contradicts it.
    NoPositiveTemperatureError
        If the slope is 0 exactly.
    """
    how: dict[str, Any] = {"weights": data.weights, "groups": data.groups, "min_judgments": 2}
    try:
        fit = fit_temperature(data.margins, data.targets, **how)
    except NoPositiveTemperatureError:
        fit = fit_temperature(-data.margins, data.targets, **how)
        return -1 / fit.temperature, fit
    return 1 / fit.temperature, fit


def fit_positive(data: DatedMargins) -> TemperatureFit:
    """Fit a temperature under the condition that it is one; the formula stands above.

    Parameters
    ----------
    data : DatedMargins

    Returns
    -------
    TemperatureFit
        That of `fit_temperature` where the slope lies six standard errors above 0.

    Raises
    ------
    TooFewJudgmentsError, SeparableError, NoPositiveTemperatureError
        As `fit_signed`.
    """
    beta, fit = fit_signed(data)
    se = fit.log_se * abs(beta)
    if beta >= SURE * se:
        return fit
    ratio = max(beta / se, LOWEST)
    known = truncnorm(-ratio, math.inf, loc=ratio * se, scale=se)
    slope = float(known.mean())
    low, high = (float(known.ppf(q)) for q in (0.025, 0.975))
    return replace(
        fit,
        temperature=1 / slope,
        low=1 / high,
        high=1 / low,
        log_se=float(known.std()) / slope,
        nll=margin_nll(data.margins, data.targets, data.weights, slope),
    )
