"""A new temperature drawn towards the one that is published, by what each of them knows.

The prior for log T now is the incumbent's log T with the variance u of its estimate and, beside
it, the variance τ² of what may have changed since:

    share = (u + τ²)/(u + τ² + v),   log T = share·log T_new + (1 − share)·log T_incumbent

where v is the squared standard error of the new estimate: the gain of a Kalman filter [1]_. τ² is
not set by hand but read off the gap that is to be explained, τ² = max(0, gap² − u − v): the moment
estimate of the parametric empirical Bayes [2]_ and of filters that adapt to their innovations [3]_.
A gap that chance explains is averaged away by precision alone, a larger one is followed nearly
whole.

u is the squared standard error of the incumbent's own fit, and not the filter's posterior
variance: windows overlap, and adding precisions up would count the same judgments at every run,
until nothing moved the temperature any more.

References
----------
.. [1] Kalman 1960.
.. [2] Morris 1983: parametric empirical Bayes inference.
.. [3] Mehra 1970: identification of variances for Kalman filtering.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ensemble_rm.calibration.methods.temperature import TemperatureFit


@dataclass(frozen=True, slots=True)
class Shrunk:
    """A temperature between its own fit and the incumbent's.

    Attributes
    ----------
    temperature : float
        What is published.
    share : float
        How much of the way from the incumbent's log T to the own one was gone, in (0, 1].
    change : float
        τ, the standard deviation of a change of log T that the gap speaks for; 0 where chance
        explains it.
    """

    temperature: float
    share: float
    change: float


def shrink(own: TemperatureFit, incumbent: TemperatureFit | None) -> Shrunk:
    """Draw a fitted temperature towards the incumbent's; the formula stands above.

    Parameters
    ----------
    own : TemperatureFit
        Of the new judgments alone.
    incumbent : TemperatureFit, optional
        Where there is none, the own one is taken as it is.

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
