"""A calibration: the temperature of one aggregator's margin, with its provenance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.temperature import (
    MIN_JUDGMENTS,
    TemperatureFit,
    fit_mixture_temperature,
    fit_temperature,
)


@dataclass(frozen=True)
class Calibration:
    """Turns the margin of one aggregator's reward into a probability.

    Attributes
    ----------
    aggregator : Aggregator
        Whose margin was calibrated; under another the temperature means nothing.
    fit : TemperatureFit
        Temperature, interval, and what it was fitted on.
    mixture_temperature : float
        T_mix of the members' mixture, for the split of uncertainty.
    digest : str
        SHA-256 of the judgments.
    created : str
        When it was fitted, ISO 8601 in UTC.
    """

    aggregator: Aggregator
    fit: TemperatureFit
    mixture_temperature: float
    digest: str
    created: str

    @property
    def temperature(self) -> float:
        """T, the divisor of the margin."""
        return self.fit.temperature

    def probability(self, margins: ArrayLike) -> Floats:
        """Return P(first is preferred) = σ(Δ/T) for margins in normalised units."""
        x = np.asarray(margins, dtype=np.float64)
        return np.asarray(expit(x / self.temperature), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return {
            "aggregator": self.aggregator.to_json(),
            "fit": asdict(self.fit),
            "mixture_temperature": self.mixture_temperature,
            "digest": self.digest,
            "created": self.created,
        }

    @classmethod
    def from_json(cls, d: Any) -> Calibration:
        """Read what `to_json` wrote."""
        return cls(
            Aggregator.from_json(d["aggregator"]),
            TemperatureFit(**d["fit"]),
            float(d["mixture_temperature"]),
            str(d["digest"]),
            str(d["created"]),
        )


def fit_calibration(
    member_margins: ArrayLike,
    margins: ArrayLike,
    targets: ArrayLike,
    *,
    aggregator: Aggregator,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    digest: str = "",
    min_judgments: int = MIN_JUDGMENTS,
) -> Calibration:
    """Fit the temperature of an aggregator's margin, and T_mix beside it.

    Parameters
    ----------
    member_margins : array_like, shape (n_pairs, n_members)
        Normalised.
    margins : array_like, shape (n_pairs,)
        Of the aggregated reward.
    targets : array_like, shape (n_pairs,)
        P(first is preferred).
    aggregator : Aggregator
        The one that made `margins`.
    weights, groups : array_like, shape (n_pairs,), optional
        Weight and prompt of each pair.
    digest : str
        Of the judgments.
    min_judgments : int
        The fewest that suffice.

    Returns
    -------
    Calibration
        Refusals as in `fit_temperature`.
    """
    fit = fit_temperature(
        margins, targets, weights=weights, groups=groups, min_judgments=min_judgments
    )
    mixture = fit_mixture_temperature(member_margins, targets, weights=weights)
    return Calibration(
        aggregator, fit, mixture, digest, datetime.now(UTC).isoformat(timespec="seconds")
    )
