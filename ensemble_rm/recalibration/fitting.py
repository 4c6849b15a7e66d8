"""A calibration of dated judgments, drawn towards the incumbent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.formulas import Floats
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
from ensemble_rm.errors import CalibrationError, OptionError, TooFewJudgmentsError
from ensemble_rm.evidence.dated_margins import DatedMargins
from ensemble_rm.recalibration.shrinkage import Shrunk, shrink
from ensemble_rm.recalibration.slope import fit_positive

MIXTURE_LIMIT = 100_000


@dataclass(frozen=True)
class Fitted:
    """What a fit found.

    Attributes
    ----------
    fit : TemperatureFit
        The shrunk temperature, with the interval and standard error of the own fit around it.
    own : TemperatureFit
        Of the judgments alone.
    shrunk : Shrunk
        How it was drawn towards the incumbent.
    slices : tuple of SliceFit
        Of the subsets, where asked for.
    effective : float
        Kish's effective number of judgments.
    """

    fit: TemperatureFit
    own: TemperatureFit
    shrunk: Shrunk
    slices: tuple[SliceFit, ...]
    effective: float


def require_enough(data: DatedMargins, minimum: int, part: str) -> float:
    """Return the effective number of judgments that have a margin.

    Raises
    ------
    TooFewJudgmentsError
        If it is below `minimum`.
    """
    informative = data.margins != 0
    found = effective_sample_size(data.weights[informative])
    if found < minimum:
        raise TooFewJudgmentsError(
            f"the {part} has {int(informative.sum())} judgments with a margin, which weigh as "
            f"{found:.0f}; it needs {minimum}: collect more, or widen the window"
        )
    return found


def fit_shrunk(
    data: DatedMargins,
    incumbent: Calibration | None,
    *,
    slices: bool,
    minimum: int,
    part: str,
) -> Fitted:
    """Fit the temperature of judgments, and draw it towards the incumbent's.

    Judgments that contradict their margins have none; where there is an incumbent to be flattened,
    they get a large one, by `fit_positive`.

    Parameters
    ----------
    data : DatedMargins
    incumbent : Calibration, optional
        The published one.
    slices : bool
        Whether each subset gets a temperature of its own, drawn towards the shrunk one.
    minimum : int
        The fewest effective judgments.
    part : str
        What the judgments are, for messages.

    Returns
    -------
    Fitted

    Raises
    ------
    TooFewJudgmentsError, SeparableError, NoPositiveTemperatureError
        Where no temperature can be fitted.
    """
    effective = require_enough(data, minimum, part)
    own = _own_fit(data) if incumbent is None else fit_positive(data)
    shrunk = shrink(own, None if incumbent is None else incumbent.fit)
    moved = shrunk.temperature / own.temperature
    fit = replace(
        own,
        temperature=shrunk.temperature,
        low=own.low * moved,
        high=own.high * moved,
        nll=margin_nll(data.margins, data.targets, data.weights, 1 / shrunk.temperature),
    )
    found = _fit_slices(data, fit) if slices else ()
    return Fitted(fit, own, shrunk, found, effective)


def _own_fit(data: DatedMargins) -> TemperatureFit:
    return fit_temperature(
        data.margins, data.targets, weights=data.weights, groups=data.groups, min_judgments=2
    )


def _fit_slices(data: DatedMargins, overall: TemperatureFit) -> tuple[SliceFit, ...]:
    """As `calibration.slices` does, from arrays: drawn towards `overall`."""
    if not (data.subsets >= 0).any():
        raise OptionError("slices need judgments that name a `subset`; none of these does")
    fits: dict[str, TemperatureFit] = {}
    refusals: dict[str, str] = {}
    for code in np.unique(data.subsets[data.subsets >= 0]):
        name, part = data.subset_names[code], data.take(np.flatnonzero(data.subsets == code))
        try:
            if part.prompts < MIN_SLICE_PROMPTS:
                raise TooFewJudgmentsError(
                    f"judgments of {part.prompts} prompts; a slice of its own needs "
                    f"{MIN_SLICE_PROMPTS}"
                )
            fits[name] = fit_temperature(
                part.margins,
                part.targets,
                weights=part.weights,
                groups=part.groups,
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
    known = {one.name: one.temperature for one in slices}
    table = np.array([known.get(name, temperature) for name in data.subset_names] + [temperature])
    return np.asarray(table[data.subsets], dtype=np.float64)  # −1 is the last, the global one


def shrunk_mixture(data: DatedMargins, incumbent: Calibration | None, share: float) -> float:
    """Fit T_mix, and draw it towards the incumbent's by the share of the temperature.

    Beyond `MIXTURE_LIMIT` judgments every so many-th is read: memory stays flat, and T_mix is known
    to a per cent.
    """
    some = slice(None, None, -(-len(data) // MIXTURE_LIMIT))
    members: NDArray[Any] = data.member_margins[some]
    own = fit_mixture_temperature(members, data.targets[some], weights=data.weights[some])
    if incumbent is None:
        return own
    old = incumbent.mixture_temperature
    return old * math.exp(share * math.log(own / old))
