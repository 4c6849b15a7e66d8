"""A calibration: the temperature of one aggregator's margin, with its provenance."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.pairs import ScoredPairs
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
    evidence : ScoredPairs, optional
        The judgments' scores, so that another aggregator's temperature can be fitted on the same
        judgments without scoring them again.
    """

    aggregator: Aggregator
    fit: TemperatureFit
    mixture_temperature: float
    digest: str
    created: str
    evidence: ScoredPairs | None = field(default=None, compare=False, repr=False)

    @property
    def temperature(self) -> float:
        """T, the divisor of the margin."""
        return self.fit.temperature

    def probability(self, margins: ArrayLike) -> Floats:
        """Return P(first is preferred) = σ(Δ/T) for margins in normalised units."""
        x = np.asarray(margins, dtype=np.float64)
        return np.asarray(expit(x / self.temperature), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads; the evidence is stored apart."""
        return {
            "aggregator": self.aggregator.to_json(),
            "fit": asdict(self.fit),
            "mixture_temperature": self.mixture_temperature,
            "digest": self.digest,
            "created": self.created,
        }

    @classmethod
    def from_json(cls, d: Any, *, evidence: ScoredPairs | None = None) -> Calibration:
        """Read what `to_json` wrote."""
        return cls(
            Aggregator.from_json(d["aggregator"]),
            TemperatureFit(**d["fit"]),
            float(d["mixture_temperature"]),
            str(d["digest"]),
            str(d["created"]),
            evidence,
        )


def fit_calibration(
    pairs: ScoredPairs,
    aggregator: Aggregator,
    *,
    digest: str = "",
    min_judgments: int = MIN_JUDGMENTS,
) -> Calibration:
    """Fit the temperature of an aggregator's margin, and T_mix beside it.

    Parameters
    ----------
    pairs : ScoredPairs
        Judgments that no member was trained on.
    aggregator : Aggregator
        Of the reward.
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
        pairs.margins(aggregator),
        pairs.targets,
        weights=pairs.weights,
        groups=pairs.groups,
        min_judgments=min_judgments,
    )
    mixture = fit_mixture_temperature(pairs.member_margins, pairs.targets, weights=pairs.weights)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Calibration(aggregator, fit, mixture, digest, now, pairs)
