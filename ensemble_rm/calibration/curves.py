"""The shapes that a calibration may take beside σ(Δ/T): margins → P(first is preferred).

Each curve is odd about ½, so that p(Δ) + p(−Δ) = 1 exactly; each is a few numbers in JSON.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.errors import OptionError


class Curve(Protocol):
    """A map from margins to probabilities, odd about ½."""

    def probability(self, margins: ArrayLike) -> Floats:
        """Return P(first is preferred) of margins; NaN stays NaN."""
        ...


def _odd(margins: ArrayLike, above: Floats) -> Floats:
    """Return `above`, the probabilities of |Δ|, where Δ > 0, one minus it where Δ < 0, ½ at 0."""
    x = np.asarray(margins, dtype=np.float64)
    p = np.where(x > 0, above, np.where(x < 0, 1 - above, 0.5))
    return np.asarray(np.where(np.isnan(x), np.nan, p), dtype=np.float64)


def _check(curve: str, edges: tuple[float, ...], values: tuple[float, ...]) -> None:
    places, heights = np.array((0.0, *edges)), np.array(values)
    if not np.isfinite(places).all() or not (np.diff(places) > 0).all():
        raise OptionError(f"a {curve} curve needs rising margins above 0, not {edges}")
    if not ((heights >= 0) & (heights <= 1)).all():
        raise OptionError(f"a {curve} curve needs probabilities in [0, 1], not {values}")


@dataclass(frozen=True)
class PowerCurve:
    """Logit p = a·sign(Δ)·|Δ|^γ: strictly rising; γ = 1 is the temperature 1/a.

    Attributes
    ----------
    a : float
        > 0.
    gamma : float
        γ > 0: below 1 large margins say less than a temperature makes of them, above 1 more.
    """

    a: float
    gamma: float

    def __post_init__(self) -> None:
        if not (0 < self.a < np.inf and 0 < self.gamma < np.inf):
            raise OptionError(f"a and gamma must be finite and > 0, not {self.a} and {self.gamma}")

    def probability(self, margins: ArrayLike) -> Floats:
        """Return σ(a·sign(Δ)·|Δ|^γ)."""
        x = np.asarray(margins, dtype=np.float64)
        with np.errstate(over="ignore"):
            return _odd(x, np.asarray(expit(self.a * np.abs(x) ** self.gamma)))


@dataclass(frozen=True)
class LinearCurve:
    """Straight lines between knots, flat beyond the last: an isotonic regression.

    Attributes
    ----------
    knots : tuple of float
        Rising margins > 0; the curve starts in (0, ½).
    values : tuple of float
        Probability at each knot.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _check("linear", self.knots, self.values)
        if len(self.knots) != len(self.values):
            raise OptionError(f"{len(self.values)} probabilities for {len(self.knots)} knots")

    def probability(self, margins: ArrayLike) -> Floats:
        """Return the interpolated probability."""
        x = np.asarray(margins, dtype=np.float64)
        return _odd(x, np.interp(np.abs(x), (0.0, *self.knots), (0.5, *self.values)))


@dataclass(frozen=True)
class StepCurve:
    """One probability a bin of |Δ|: a binning calibrator.

    Attributes
    ----------
    edges : tuple of float
        Rising margins > 0 between the bins; a margin on an edge belongs to the bin below.
    values : tuple of float
        Probability in each bin, one more than edges.
    """

    edges: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        _check("step", self.edges, self.values)
        if len(self.edges) + 1 != len(self.values):
            raise OptionError(f"{len(self.values)} probabilities for {len(self.edges)} edges")

    def probability(self, margins: ArrayLike) -> Floats:
        """Return the probability of each margin's bin."""
        x = np.asarray(margins, dtype=np.float64)
        return _odd(x, np.array(self.values)[np.searchsorted(self.edges, np.abs(x), side="left")])


AnyCurve: TypeAlias = PowerCurve | LinearCurve | StepCurve
_SHAPES: dict[str, type[AnyCurve]] = {
    "power": PowerCurve,
    "linear": LinearCurve,
    "step": StepCurve,
}


def curve_json(curve: AnyCurve) -> dict[str, Any]:
    """Return a curve as a JSON object that `read_curve` reads."""
    name = next(name for name, shape in _SHAPES.items() if type(curve) is shape)
    said = asdict(curve)
    return {"shape": name} | {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}


def read_curve(said: Any) -> AnyCurve:
    """Read what `curve_json` wrote; an unknown shape raises `OptionError`."""
    fields = dict(said)
    name = fields.pop("shape", None)
    if name not in _SHAPES:
        raise OptionError(f"no curve {name!r}; there are {', '.join(_SHAPES)}")
    shape: Any = _SHAPES[name]
    curve: AnyCurve = shape(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    )
    return curve


def count_ties(curve: Curve, margins: ArrayLike) -> int:
    """Say how many distinct |Δ| the curve can no longer tell apart from a neighbour."""
    sizes = np.unique(np.abs(np.asarray(margins, dtype=np.float64)))
    return len(sizes) - len(np.unique(curve.probability(sizes)))
