r"""Fit a temperature to dated judgments, and shrink it towards the incumbent's.

**Slope.** The likelihood of a slope β = 1/T has its maximum at any real number, but a temperature
needs β > 0. Where judgments hardly follow their margins, or contradict them, β is near 0 or below.
The estimate of a positive slope is then the mean of the estimate's normal distribution, truncated
at 0, with mean and variance [1]_

    β̃ = β + s·h,   var = s²(1 − h(h + β/s)),   h = φ(β/s)/Φ(β/s)

where s is the standard error over prompts. Far above 0 this is the estimate itself. Near 0 and
below it is a small slope ("nearly p = ½") with a standard error of log T of about 1, where the
plain estimate would give no temperature, or one so large and uncertain that it has no weight.

**Shrinkage.** The prior of log T is the incumbent's log T, with the variance u of its estimate plus
the variance τ² of a possible change since:

    share = (u + τ²)/(u + τ² + v),   log T = share·log T_new + (1 − share)·log T_incumbent

where v is the squared standard error of the new estimate: the gain of a Kalman filter [2]_. τ² is
not a setting; it is estimated from the gap to explain, τ² = max(0, gap² − u − v): the moment
estimate of the parametric empirical Bayes [3]_ and of filters that adapt to their innovations [4]_.
A gap that chance explains is averaged by precision, a larger one is followed almost entirely.

u is the squared standard error of the incumbent's own fit, not the filter's posterior variance:
windows overlap, and adding precisions would count the same judgments in every run, until no new
judgment could change the temperature.

References
----------
.. [1] Johnson, Kotz & Balakrishnan 1994, Continuous Univariate Distributions 1, 13.10.1.
.. [2] Kalman 1960.
.. [3] Morris 1983: parametric empirical Bayes inference.
.. [4] Mehra 1970: identification of variances for Kalman filtering.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import truncnorm

from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.methods.temperature import (
    TemperatureFit,
    fit_mixture_temperature,
    fit_temperature,
    margin_nll,
)
from ensemble_rm.calibration.slices import (
    MIN_SLICE_JUDGMENTS,
    MIN_SLICE_PROMPTS,
    SliceFit,
    shrink as shrink_slices,
)
from ensemble_rm.data.weights import effective_sample_size
from ensemble_rm.errors import (
    CalibrationError,
    NoPositiveTemperatureError,
    OptionError,
    TooFewJudgmentsError,
)
from ensemble_rm.evidence.dated_margins import DatedMargins

UNTRUNCATED = 6.0  # standard errors above 0 beyond which truncation changes nothing: h < 1e-8
LOWEST_RATIO = -50.0  # β/s below which only rounding errors change
MIXTURE_LIMIT = 100_000


# Slope ---------------------------------------------------------------------------------------


def fit_signed(data: DatedMargins) -> tuple[float, TemperatureFit]:
    """Return the maximum-likelihood slope, and the fit of its absolute value.

    Raises
    ------
    TooFewJudgmentsError
        If fewer than two judgments have a margin.
    SeparableError
        If every judgment agrees with its margin, or every one contradicts it.
    NoPositiveTemperatureError
        If the slope is exactly 0.
    """
    try:
        fit = _fit(data, data.margins)
    except NoPositiveTemperatureError:
        # Inverted labels: the slope of the negated margins, with the opposite sign.
        fit = _fit(data, -data.margins)
        return -1 / fit.temperature, fit
    return 1 / fit.temperature, fit


def fit_positive(data: DatedMargins) -> TemperatureFit:
    """Fit a temperature given that the slope is positive; see the module's formula.

    Parameters
    ----------
    data : DatedMargins

    Returns
    -------
    TemperatureFit
        Equal to `fit_temperature` where the slope is six standard errors above 0.

    Raises
    ------
    TooFewJudgmentsError, SeparableError, NoPositiveTemperatureError
        See `fit_signed`.
    """
    beta, fit = fit_signed(data)
    # The delta method: the standard error of log T is that of β, relative to β.
    se = fit.log_se * abs(beta)
    if beta >= UNTRUNCATED * se:
        return fit
    ratio = max(beta / se, LOWEST_RATIO)
    posterior = truncnorm(-ratio, math.inf, loc=ratio * se, scale=se)
    slope = float(posterior.mean())
    low, high = (float(posterior.ppf(q)) for q in (0.025, 0.975))
    return replace(
        fit,
        temperature=1 / slope,
        # T = 1/β reverses the interval.
        low=1 / high,
        high=1 / low,
        log_se=float(posterior.std()) / slope,
        nll=margin_nll(data.margins, data.targets, data.weights, slope),
    )


def _fit(data: DatedMargins, margins: Floats) -> TemperatureFit:
    return fit_temperature(
        margins,
        data.targets,
        weights=data.weights,
        groups=data.groups,
        annotators=data.annotators,
        min_judgments=2,
    )


# Shrinkage -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A temperature between its own fit and the incumbent's.

    Attributes
    ----------
    temperature : float
        The one to publish.
    share : float
        Share of the way from the incumbent's log T to the new one, in (0, 1].
    change : float
        τ, the standard deviation of a change of log T that the gap suggests; 0 where chance
        explains the gap.
    """

    temperature: float
    share: float
    change: float


def shrink(own: TemperatureFit, incumbent: TemperatureFit | None) -> Shrunk:
    """Shrink a fitted temperature towards the incumbent's; see the module's formula.

    Parameters
    ----------
    own : TemperatureFit
        Of the new judgments alone.
    incumbent : TemperatureFit, optional
        Without one, `own` is returned unchanged.

    Returns
    -------
    Shrunk
    """
    if incumbent is None:
        return Shrunk(own.temperature, 1.0, 0.0)
    gap = math.log(own.temperature / incumbent.temperature)
    u, v = incumbent.log_se**2, own.log_se**2
    change = max(0.0, gap**2 - u - v)
    share = (u + change) / (u + change + v) if u + change + v > 0 else 1.0
    return Shrunk(incumbent.temperature * math.exp(share * gap), share, math.sqrt(change))


# Fit -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """The result of `fit_shrunk`.

    Attributes
    ----------
    fit : TemperatureFit
        The shrunk temperature, with the interval and standard error of the own fit around it.
    own : TemperatureFit
        Of the judgments alone.
    shrunk : Shrunk
        How it was shrunk towards the incumbent.
    slices : tuple of SliceFit
        Per subset, where requested.
    effective : float
        Kish's effective number of judgments.
    """

    fit: TemperatureFit
    own: TemperatureFit
    shrunk: Shrunk
    slices: tuple[SliceFit, ...]
    effective: float


def require_enough(data: DatedMargins, minimum: int, part: str) -> float:
    """Return the effective number of judgments with a nonzero margin.

    Raises
    ------
    TooFewJudgmentsError
        If it is below `minimum`.
    """
    # At a margin of 0, p is ½ at every temperature: such a judgment says nothing about T.
    informative = data.margins != 0
    effective = effective_sample_size(data.weights[informative])
    if effective < minimum:
        raise TooFewJudgmentsError(
            f"the {part} has {int(informative.sum())} judgments with a margin and an effective "
            f"number of {effective:.0f}; it needs {minimum}: collect more, or widen the window"
        )
    return effective


def fit_shrunk(
    data: DatedMargins,
    incumbent: Calibration | None,
    *,
    slices: bool,
    minimum: int,
    part: str,
) -> Fitted:
    """Fit the temperature of judgments, and shrink it towards the incumbent's.

    Judgments that contradict their margins have no positive temperature. With an incumbent,
    `fit_positive` gives a large one, which flattens the probabilities; without one, they are an
    error.

    Parameters
    ----------
    data : DatedMargins
    incumbent : Calibration, optional
        The published one.
    slices : bool
        Fit one temperature per subset as well, shrunk towards the overall one.
    minimum : int
        Fewest effective judgments.
    part : str
        Name of this part of the judgments, for messages.

    Returns
    -------
    Fitted

    Raises
    ------
    TooFewJudgmentsError, SeparableError, NoPositiveTemperatureError
        If no temperature can be fitted.
    """
    effective = require_enough(data, minimum, part)
    own = _fit(data, data.margins) if incumbent is None else fit_positive(data)
    shrunk = shrink(own, None if incumbent is None else incumbent.fit)
    # One factor for both bounds: in log T the interval keeps its width.
    moved = shrunk.temperature / own.temperature
    fit = replace(
        own,
        temperature=shrunk.temperature,
        low=own.low * moved,
        high=own.high * moved,
        nll=margin_nll(data.margins, data.targets, data.weights, 1 / shrunk.temperature),
    )
    return Fitted(fit, own, shrunk, _fit_slices(data, fit) if slices else (), effective)


def _fit_slices(data: DatedMargins, overall: TemperatureFit) -> tuple[SliceFit, ...]:
    """Fit one temperature per subset, shrunk towards `overall` as in `calibration.slices`."""
    if not (data.subsets >= 0).any():
        raise OptionError("slices need judgments with a `subset`; none of these has one")
    fits: dict[str, TemperatureFit] = {}
    refusals: dict[str, str] = {}
    for code in np.unique(data.subsets[data.subsets >= 0]):
        name, part = data.subset_names[code], data.take(np.flatnonzero(data.subsets == code))
        try:
            if part.prompts < MIN_SLICE_PROMPTS:
                raise TooFewJudgmentsError(
                    f"judgments of {part.prompts} prompts; a slice needs {MIN_SLICE_PROMPTS}"
                )
            fits[name] = fit_temperature(
                part.margins,
                part.targets,
                weights=part.weights,
                groups=part.groups,
                annotators=part.annotators,
                min_judgments=MIN_SLICE_JUDGMENTS,
            )
        except CalibrationError as error:
            refusals[name] = str(error)
    return shrink_slices(fits, refusals, overall=overall)


def row_temperatures(
    temperature: float, slices: tuple[SliceFit, ...], data: DatedMargins
) -> Floats | float:
    """Return the temperature of each judgment's pair; one number where all share it."""
    if not slices:
        return temperature
    by_name = {one.name: one.temperature for one in slices}
    table = [by_name.get(name, temperature) for name in data.subset_names] + [temperature]
    # A judgment without a subset has code −1, which indexes the last entry: the overall one.
    return np.asarray(np.array(table)[data.subsets], dtype=np.float64)


def shrunk_mixture(data: DatedMargins, incumbent: Calibration | None, share: float) -> float:
    """Fit T_mix, and shrink it towards the incumbent's by the temperature's share.

    Above `MIXTURE_LIMIT` judgments an even subsample is used, which bounds memory and still
    determines T_mix to one per cent.
    """
    # The step is rounded up, so that at most `MIXTURE_LIMIT` judgments are left.
    rows = slice(None, None, -(-len(data) // MIXTURE_LIMIT))
    members: NDArray[Any] = data.member_margins[rows]
    own = fit_mixture_temperature(members, data.targets[rows], weights=data.weights[rows])
    if incumbent is None:
        return own
    old = incumbent.mixture_temperature
    return old * math.exp(share * math.log(own / old))
