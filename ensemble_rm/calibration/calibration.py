"""A calibration: from one aggregator's margin to a probability, with its provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibrator import Curve, find_calibrator
from ensemble_rm.calibration.limits import MIN_JUDGMENTS
from ensemble_rm.calibration.methods.temperature import (
    TemperatureFit,
    fit_mixture_temperature,
    fit_temperature,
)
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.calibration.slices import SliceFit, fit_slices
from ensemble_rm.calibration.ties import TieModel, fit_ties
from ensemble_rm.errors import AggregatorMismatchError, NotCalibratedError, OptionError
from ensemble_rm.saved_json import at, from_row


@dataclass(frozen=True)
class Calibration:
    """Turns the margin of one aggregator's reward into a probability.

    Attributes
    ----------
    aggregator : Aggregator
        Its margin was calibrated; the temperature is meaningless for any other.
    fit : TemperatureFit
        Temperature, interval, and what it was fitted on.
    mixture_temperature : float
        T_mix of the mixture of members, which splits the uncertainty.
    digest : str
        SHA-256 of the judgments.
    created : str
        Time of the fit, ISO 8601 in UTC.
    method : str
        Name of the calibrator: ``"temperature"``, ``"power"``, ``"isotonic"``, ``"histogram"``,
        ``"bbq"``, or a registered one.
    curve : Curve, optional
        The curve that the method fitted; None for a temperature alone.
    slices : tuple of SliceFit
        Temperatures of subsets, where they were fitted.
    ties : int
        Number of distinct margins of the judgments to which the curve gives the probability of a
        smaller one; 0 where it rises strictly. A curve with ties is for reading probabilities,
        never for an RL reward: a policy learns nothing on its flat parts. (Ties between
        completions are another matter, see `tie_model`.)
    evidence : ScoredPairs, optional
        Scores of the judgments, so that another aggregator can be calibrated without scoring them
        again.
    tie_model : TieModel, optional
        P(first), P(tie), P(second) of a margin, with a temperature of its own.
    """

    aggregator: Aggregator
    fit: TemperatureFit
    mixture_temperature: float
    digest: str
    created: str
    method: str = "temperature"
    curve: Curve | None = None
    slices: tuple[SliceFit, ...] = ()
    ties: int = 0
    evidence: ScoredPairs | None = field(default=None, compare=False, repr=False)
    tie_model: TieModel | None = None

    def __post_init__(self) -> None:
        # A curve of another method would be evaluated in the wrong units.
        wanted = find_calibrator(self.method).curve
        if type(self.curve) is not (wanted or type(None)):
            raise OptionError(f"no calibration has method {self.method!r} and curve {self.curve}")
        if not 0 < self.mixture_temperature < math.inf:
            raise OptionError(
                f"mixture_temperature must be finite and > 0, not {self.mixture_temperature!r}"
            )
        try:
            # Empty where nobody stated it, as in a decision without a job.
            datetime.fromisoformat(self.created or "1970-01-01")
        except ValueError:
            raise OptionError(f"created must be a time in ISO 8601, not {self.created!r}") from None

    @property
    def temperature(self) -> float:
        """T of all judgments, a divisor of the margin; fitted under every method."""
        return self.fit.temperature

    def temperature_of(self, subset: str | None) -> float:
        """Return T of a slice; the global one for None and for names without a slice."""
        return next((s.temperature for s in self.slices if s.name == subset), self.temperature)

    def probability(
        self, margins: ArrayLike, *, subsets: Sequence[str | None] | None = None
    ) -> Floats:
        """Return P(first is preferred) of margins in normalised units.

        Parameters
        ----------
        margins : array_like, shape (n_pairs,)
            Margins of the aggregated reward.
        subsets : sequence of (str or None), optional
            Slice of each pair. Pairs without a slice, or with an unknown one, take the global
            temperature.

        Returns
        -------
        ndarray, shape (n_pairs,)
            σ(Δ/T), or the value of the method's curve.
        """
        x = np.asarray(margins, dtype=np.float64)
        if self.curve is not None:
            return self.curve.probability(x)
        # Without named slices one division serves all pairs.
        if subsets is None or not self.slices:
            return np.asarray(expit(x / self.temperature), dtype=np.float64)
        if x.shape != (len(subsets),):
            raise OptionError(f"{len(subsets)} subsets for margins of shape {x.shape}")
        # Each slice is looked up once, not once per pair.
        known = {name: self.temperature_of(name) for name in dict.fromkeys(subsets)}
        divisors = np.array([known[name] for name in subsets])
        return np.asarray(expit(x / divisors), dtype=np.float64)

    def outcomes(self, margins: ArrayLike) -> Floats | None:
        """Return P(first), P(tie), P(second), shape (n_pairs, 3); None without a tie model."""
        return None if self.tie_model is None else self.tie_model.outcomes(margins)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads; the evidence is stored separately."""
        return {
            "aggregator": self.aggregator.to_json(),
            "fit": asdict(self.fit),
            "mixture_temperature": self.mixture_temperature,
            "digest": self.digest,
            "created": self.created,
            "method": self.method,
            "curve": None if self.curve is None else self.curve.to_json(),
            "slices": [fit.to_json() for fit in self.slices],
            "ties": self.ties,
            "tie_model": None if self.tie_model is None else self.tie_model.to_json(),
        }

    @classmethod
    def from_json(cls, d: Any, *, evidence: ScoredPairs | None = None) -> Calibration:
        """Read what `to_json` wrote; older files have no method, slices or tie model.

        Raises
        ------
        SchemaError
            If it is something else: a temperature that is not > 0, a time that is no time, …
        """
        row = from_row(_CalibrationRow, d)
        with at("aggregator"):
            aggregator = Aggregator.from_json(row.aggregator)
        with at("method"):
            calibrator = find_calibrator(row.method)
        with at("curve"):
            curve = calibrator.read_curve(row.curve)
        with at():
            return cls(
                aggregator,
                row.fit,
                row.mixture_temperature,
                row.digest,
                row.created,
                row.method,
                curve,
                row.slices,
                row.ties,
                evidence,
                row.tie_model,
            )


@dataclass(frozen=True, slots=True)
class _CalibrationRow:
    """A calibration as JSON."""

    aggregator: Mapping[str, Any]
    fit: TemperatureFit
    mixture_temperature: float
    digest: str
    created: str
    method: str = "temperature"
    curve: Mapping[str, Any] | None = None
    slices: tuple[SliceFit, ...] = ()
    ties: int = 0
    tie_model: TieModel | None = None
    subset_names: tuple[str, ...] = ()  # of the evidence, which is stored separately


def fit_calibration(
    pairs: ScoredPairs,
    aggregator: Aggregator,
    *,
    method: str = "temperature",
    slices: bool = False,
    ties: str | None = None,
    digest: str = "",
    min_judgments: int = MIN_JUDGMENTS,
) -> Calibration:
    """Fit the temperature of an aggregator's margin, T_mix, and the method's curve.

    Parameters
    ----------
    pairs : ScoredPairs
        Judgments that no member was trained on. Pairs that too few members scored are left out.
    aggregator : Aggregator
        Of the reward.
    method : str
        ``"temperature"``, ``"power"``, ``"isotonic"``, ``"histogram"``, ``"bbq"``, or a registered
        calibrator.
    slices : bool
        Whether each subset of the judgments gets a shrunk temperature of its own.
    ties : str, optional
        Tie model to fit as well: ``"davidson"`` or ``"rao-kupper"``.
    digest : str
        SHA-256 of the judgments.
    min_judgments : int
        Minimum number of judgments.

    Returns
    -------
    Calibration
        Raises as `fit_temperature`, which runs under every method, and as `fit_ties`.

    Raises
    ------
    OptionError
        If the method is unknown, cannot use these votes and weights, or has no slices.
    """
    if slices and find_calibrator(method).fit is not None:
        raise OptionError(f"slices=True works with method='temperature' only, not {method!r}")
    # First: pairs whose reward is NaN must not enter the temperature either.
    pairs = pairs.rewarded(aggregator)
    margins = pairs.margins(aggregator)
    fit = fit_temperature(
        margins,
        pairs.targets,
        weights=pairs.weights,
        groups=pairs.groups,
        min_judgments=min_judgments,
    )
    calibrator = find_calibrator(method)
    curve = calibrator.fit_curve(margins, pairs.targets, pairs.weights, temperature=fit.temperature)
    # On the members' margins, not the reward's: the split of uncertainty uses the mixture.
    mixture = fit_mixture_temperature(pairs.member_margins, pairs.targets, weights=pairs.weights)
    return Calibration(
        aggregator,
        fit,
        mixture,
        digest,
        datetime.now(UTC).isoformat(timespec="seconds"),
        method,
        curve,
        fit_slices(pairs, aggregator, overall=fit) if slices else (),
        calibrator.count_ties(curve, margins),
        pairs,
        None if ties is None else _fit_ties(pairs, margins, ties, min_judgments),
    )


def _fit_ties(pairs: ScoredPairs, margins: Floats, model: str, fewest: int) -> TieModel:
    return fit_ties(
        margins,
        pairs.targets,
        pairs.ties,
        model=model,
        weights=pairs.weights,
        groups=pairs.groups,
        min_judgments=fewest,
    )


def refit_calibration(old: Calibration | None, aggregator: Aggregator) -> Calibration:
    """Calibrate another aggregator by the same method on the same judgments.

    Raises
    ------
    NotCalibratedError
        If there is no calibration, or its judgments' scores were not kept.
    """
    if old is None or old.evidence is None:
        raise NotCalibratedError(
            "no judgments were stored with this ensemble; call calibrate(held)"
        )
    return fit_calibration(
        old.evidence,
        aggregator,
        method=old.method,
        slices=bool(old.slices),
        ties=None if old.tie_model is None else old.tie_model.model,
        digest=old.digest,
        # These judgments were enough at the first fit; a stricter limit now would lose them.
        min_judgments=2,
    )


def require_calibration(calibration: Calibration | None, aggregator: Aggregator) -> Calibration:
    """Return the calibration if it exists and belongs to the aggregator.

    Raises
    ------
    NotCalibratedError
        If there is none.
    AggregatorMismatchError
        If it belongs to another aggregator.
    """
    if calibration is None:
        raise NotCalibratedError(
            "this ensemble has no calibration, so its margins are not probabilities; "
            "call calibrate(held) with judgments that it was not trained on"
        )
    # Another aggregator's margins have another scale, so T would be wrong by a factor.
    if calibration.aggregator != aggregator:
        raise AggregatorMismatchError(
            f"the calibration was fitted with {calibration.aggregator}, not {aggregator}; "
            "call recalibrate(aggregator), or calibrate again"
        )
    return calibration
