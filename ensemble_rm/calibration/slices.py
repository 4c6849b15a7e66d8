"""One temperature per slice of the judgments, shrunk towards the global one where they are few.

log T of a slice is shrunk by B = τ²/(τ² + se²) [1]_: se is its cluster-robust standard error, and
τ², the variance of the true log T among slices, is DerSimonian & Laird's estimate [2]_. The centre
is the log T of all judgments, as in the calibration, and not the weighted mean of the slices.

References
----------
.. [1] Morris 1983: parametric empirical Bayes inference.
.. [2] DerSimonian & Laird 1986: meta-analysis in clinical trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.methods.temperature import TemperatureFit, fit_temperature
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.errors import CalibrationError, OptionError, TooFewJudgmentsError
from ensemble_rm.saved_json import from_row

MIN_SLICE_JUDGMENTS = 20
MIN_SLICE_PROMPTS = 10  # fewer clusters make a robust standard error meaningless


@dataclass(frozen=True)
class SliceFit:
    """The temperature of one slice.

    Attributes
    ----------
    name : str
        Subset of the pairs.
    temperature : float
        Shrunk temperature, which comparisons in this slice use.
    own : TemperatureFit, optional
        Fit of the slice's judgments alone.
    share : float
        B, the weight of the slice's own log T; with 0 it has the global one.
    refusal : str
        Why the slice has no fit of its own; empty where it has one.
    """

    name: str
    temperature: float
    own: TemperatureFit | None
    share: float
    refusal: str = ""

    def __post_init__(self) -> None:
        if not (0 < self.temperature < math.inf and 0 <= self.share <= 1):
            raise OptionError(
                f"slice {self.name!r} cannot have temperature={self.temperature!r} and "
                f"share={self.share!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: Any) -> SliceFit:
        """Read what `to_json` wrote, else `SchemaError`."""
        return from_row(cls, d)


def fit_slices(
    pairs: ScoredPairs, aggregator: Aggregator, *, overall: TemperatureFit
) -> tuple[SliceFit, ...]:
    """Fit each named slice, and shrink it towards the temperature of all judgments.

    Parameters
    ----------
    pairs : ScoredPairs
        Judgments with subsets; those without one count in the global fit only.
    aggregator : Aggregator
        Aggregator of the reward.
    overall : TemperatureFit
        Fit of all judgments.

    Returns
    -------
    tuple of SliceFit
        Sorted by name. A slice that cannot be fitted has the global temperature and a `refusal`.

    Raises
    ------
    OptionError
        If no judgment has a subset.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(pairs.subsets):
        if name is not None:
            rows.setdefault(name, []).append(row)
    if not rows:
        raise OptionError("slices need judgments with a `subset`, and none of these has one")
    fits: dict[str, TemperatureFit] = {}
    refusals: dict[str, str] = {}
    for name in sorted(rows):
        try:
            fits[name] = _fit_one(pairs.take(np.array(rows[name])), aggregator)
        # Too few or contradictory judgments: the slice gets the overall temperature, with the
        # reason.
        except CalibrationError as error:
            refusals[name] = str(error)
    return shrink(fits, refusals, overall=overall)


def _fit_one(pairs: ScoredPairs, aggregator: Aggregator) -> TemperatureFit:
    prompts = len(np.unique(pairs.groups))
    if prompts < MIN_SLICE_PROMPTS:
        raise TooFewJudgmentsError(
            f"judgments of {prompts} prompts; a temperature of its own needs {MIN_SLICE_PROMPTS}"
        )
    return fit_temperature(
        pairs.margins(aggregator),
        pairs.targets,
        weights=pairs.weights,
        groups=pairs.groups,
        min_judgments=MIN_SLICE_JUDGMENTS,
    )


def shrink(
    fits: Mapping[str, TemperatureFit], refusals: Mapping[str, str], *, overall: TemperatureFit
) -> tuple[SliceFit, ...]:
    """Shrink the slices' fits towards the overall one; slices without a fit get the overall T."""
    logs = [math.log(fit.temperature) for fit in fits.values()]
    # Between-slice variance of log T, after taking off what sampling alone explains.
    tau2 = between_variance(logs, [fit.log_se for fit in fits.values()])
    centre = math.log(overall.temperature)
    fitted = [SliceFit(name, overall.temperature, None, 0.0, why) for name, why in refusals.items()]
    for (name, fit), own in zip(fits.items(), logs, strict=True):
        # A precise slice keeps its own T; an imprecise one moves to the overall one.
        share = tau2 / (tau2 + fit.log_se**2) if tau2 > 0 else 0.0
        # On the log scale, where T's error is about normal.
        shrunk = overall.temperature * math.exp(share * (own - centre))
        fitted.append(SliceFit(name, shrunk, fit, share))
    return tuple(sorted(fitted, key=lambda fit: fit.name))


def between_variance(estimates: Sequence[float], errors: Sequence[float]) -> float:
    """Return DerSimonian & Laird's τ² ≥ 0 [2]_; 0 for fewer than two estimates.

    Parameters
    ----------
    estimates, errors : sequence of float
        Estimate of each slice, and its standard error, > 0.
    """
    if len(estimates) < 2:
        return 0.0
    x, w = np.array(estimates), 1 / np.array(errors) ** 2
    centre = (w * x).sum() / w.sum()
    q = float((w * (x - centre) ** 2).sum())
    return max(0.0, (q - (len(x) - 1)) / float(w.sum() - (w**2).sum() / w.sum()))
