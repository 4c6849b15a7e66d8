"""What a calibrator is made of: a fit, the curve that it fits, and a name.

A new calibrator is one `Calibrator`, registered once. Nothing else needs to know about it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import OptionError, SchemaError
from ensemble_rm.saved_json import as_object, from_row


class Curve(ABC):
    """A map from margins to P(first is preferred), odd about ½: p(Δ) + p(−Δ) = 1.

    A subclass is a frozen dataclass of numbers and tuples of numbers, which are its JSON. It
    implements `above`; the base class extends it to negative margins, so that swapping the sides
    of a pair always gives the complement.
    """

    shape: ClassVar[str]
    """The curve's name in JSON."""

    @abstractmethod
    def above(self, sizes: Floats) -> Floats:
        """Return P(first is preferred) at margins > 0, an array of any shape."""

    def probability(self, margins: ArrayLike) -> Floats:
        """Return P(first is preferred) of margins; ½ at 0, and NaN stays NaN."""
        x = np.asarray(margins, dtype=np.float64)
        # Only sizes are mapped, so that p(Δ) + p(−Δ) = 1 holds exactly.
        above = self.above(np.abs(x))
        # The sign decides; at 0 neither side is preferred.
        p = np.where(x > 0, above, np.where(x < 0, 1 - above, 0.5))
        return np.asarray(np.where(np.isnan(x), np.nan, p), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        values = asdict(self)  # type: ignore[call-overload]
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"shape": self.shape} | lists

    @classmethod
    def from_json(cls, d: Any) -> Self:
        """Read what `to_json` wrote.

        Raises
        ------
        SchemaError
            If it is a curve of another shape, or its numbers make no curve.
        """
        values = as_object(d)
        shape = values.pop("shape", None)
        if shape != cls.shape:
            raise SchemaError(f"must be {cls.shape!r}, not {shape!r:.80}", field="shape")
        return from_row(cls, values)


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """The judgments that a curve is fitted on.

    `fit_temperature` has accepted them: they are neither too few, nor separable, nor against their
    margins.

    Attributes
    ----------
    margins : ndarray, shape (n_pairs,)
        Aggregated reward of the first minus that of the second; none is 0, since every curve is ½
        there.
    targets : ndarray, shape (n_pairs,)
        P(first is preferred), in [0, 1].
    weights : ndarray, shape (n_pairs,)
        How much each judgment counts, > 0.
    temperature : float
        T > 0 of these judgments.
    """

    margins: Floats
    targets: Floats
    weights: Floats
    temperature: float


Fit: TypeAlias = Callable[[CalibrationData], Curve]


@dataclass(frozen=True)
class Calibrator:
    """One way to turn margins into probabilities: a name, a curve and its fit.

    Parameters
    ----------
    name : str
        As in ``calibrate(method=…)`` and in saved calibrations.
    curve : type of Curve, optional
        What the fit returns; None for the temperature alone, p = σ(Δ/T).
    fit : callable, optional
        ``fit(data: CalibrationData) -> Curve``. The temperature is fitted first under every
        method, and refuses judgments that no method can use.
    strict : bool
        Whether the curve rises strictly, so that it never gives two margins one probability. An
        RL reward needs that.
    """

    name: str
    curve: type[Curve] | None = None
    fit: Fit | None = None
    strict: bool = False

    def fit_curve(
        self, margins: Floats, targets: Floats, weights: Floats, *, temperature: float
    ) -> Curve | None:
        """Fit the curve on judgments that `fit_temperature` accepted; None without a curve."""
        if self.fit is None:
            return None
        # Margins of 0 say ½ under every curve and would only pull at the fit.
        rows = margins != 0
        data = CalibrationData(margins[rows], targets[rows], weights[rows], temperature)
        return self.fit(data)

    def read_curve(self, d: Any) -> Curve | None:
        """Read the curve that `Curve.to_json` wrote; None of a method without a curve.

        Raises
        ------
        SchemaError
            If a curve is missing, or not of the shape that this method fits.
        """
        if (self.curve is None) != (d is None):
            wrong = "a curve" if d is not None else "no curve"
            raise SchemaError(f"a calibration by method {self.name!r} cannot have {wrong}")
        return None if self.curve is None else self.curve.from_json(d)

    def count_ties(self, curve: Curve | None, margins: ArrayLike) -> int:
        """Return how many distinct |Δ| the curve does not tell apart from a smaller one."""
        # A strictly rising curve tells all margins apart.
        if curve is None or self.strict:
            return 0
        sizes = np.unique(np.abs(np.asarray(margins, dtype=np.float64)))
        # Two sizes of one probability are ranked the same: the curve made them ties.
        return len(sizes) - len(np.unique(curve.probability(sizes)))


CALIBRATORS: dict[str, Calibrator] = {}
"""Every registered calibrator by its name."""


def register(calibrator: Calibrator) -> Calibrator:
    """Make a calibrator known to ``calibrate(method=…)`` and to saved calibrations.

    Parameters
    ----------
    calibrator : Calibrator
        Register it before a calibration that uses it is loaded.

    Returns
    -------
    Calibrator
        The same one.

    Raises
    ------
    OptionError
        If another calibrator has the name.
    """
    _register_own()
    # Registering the same calibrator twice is harmless.
    if CALIBRATORS.setdefault(calibrator.name, calibrator) != calibrator:
        raise OptionError(
            f"a calibrator {calibrator.name!r} is registered already; use another name"
        )
    return calibrator


def find_calibrator(name: str) -> Calibrator:
    """Return the calibrator of a name.

    Raises
    ------
    OptionError
        If there is none.
    """
    _register_own()
    if name not in CALIBRATORS:
        raise OptionError(f"no calibration method {name!r}; choose one of {', '.join(CALIBRATORS)}")
    return CALIBRATORS[name]


def _register_own() -> None:
    """Register the library's own calibrators, once; scipy, which they need, takes a second."""
    import ensemble_rm.calibration.methods  # noqa: F401
