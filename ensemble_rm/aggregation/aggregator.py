"""Members' scores to one score: the aggregators and what they do about a missing member.

Knows arrays of floats; knows nothing of members, margins, temperatures or judgments. Coefficients
act in the unit of the scores: normalise the members first, or λ, κ and β change their meaning with
every version of a member.

References
----------
.. [1] Coste et al. 2023, arXiv 2310.02743: mean, minimum (WCO) and UWO.
.. [2] Zhang et al. 2024, arXiv 2401.16635: the lower confidence bound.
.. [3] arXiv 2606.09073: the entropic aggregator, a soft minimum.
.. [4] Rockafellar & Uryasev 2000: conditional value at risk (CVaR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble_rm.aggregation.formulas import FORMULAS, Floats, Sorted
from ensemble_rm.errors import NonFiniteScoreError, OptionError

NanPolicy: TypeAlias = Literal["raise", "omit"]

_SHOWN = 10  # bad entries that a message names


AGGREGATORS: dict[str, tuple[str, ...]] = {name: names for name, (_, names) in FORMULAS.items()}
"""Every aggregator's name, with the names of its coefficients."""

_DOMAINS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lam": ("a finite number ≥ 0", lambda value: value >= 0),
    "kappa": ("a finite number ≥ 0", lambda value: value >= 0),
    "beta": ("a finite number > 0", lambda value: value > 0),
    "q": ("a number in [0, 1]", lambda value: 0 <= value <= 1),
    "alpha": ("a number in (0, 1]", lambda value: 0 < value <= 1),
}


def _coefficient(aggregator: str, name: str, value: object) -> float:
    wanted, holds = _DOMAINS[name]
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise OptionError(f"{aggregator}: {name} must be {wanted}, not {value!r}")
    number = float(value)
    if not math.isfinite(number) or not holds(number):
        raise OptionError(f"{aggregator}: {name} must be {wanted}, not {value!r}")
    return number + 0.0  # −0 is 0


def score_matrix(scores: ArrayLike) -> Floats:
    """Read scores as a float64 matrix; values, NaN and infinity included, are left as they are.

    Parameters
    ----------
    scores : array_like, shape (n_samples, n_members)
        One column a member.

    Returns
    -------
    ndarray of float64, shape (n_samples, n_members)
        The scores, C-contiguous.

    Raises
    ------
    OptionError
        If the input is not a real matrix with at least one column.
    """
    try:
        raw = np.asarray(scores)
    except ValueError as error:
        raise OptionError(f"scores must be an (n, k) matrix of numbers: {error}") from error
    if raw.dtype.kind not in "fiu":
        raise OptionError(f"scores must be real numbers, not an array of {raw.dtype}")
    if raw.ndim != 2 or raw.shape[1] == 0:
        raise OptionError(
            f"scores must have the shape (n_samples, n_members) with n_members ≥ 1, not "
            f"{raw.shape}; one member's scores are scores[:, None]"
        )
    return np.ascontiguousarray(raw, dtype=np.float64)


def name_entries(bad: NDArray[np.bool_]) -> str:
    """Name the rows and members where `bad`, an (n, k) mask, is set: a message's own words."""
    places = np.argwhere(bad)
    shown = ", ".join(f"row {row} member {member}" for row, member in places[:_SHOWN])
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return shown + more


@dataclass(frozen=True)
class Aggregator:
    """How the members' scores of a sample become one score.

    Two aggregators are equal if their fields are. Use the factories (`mean`, `lcb`, …) or, with a
    name from a command line, `make_aggregator`.

    Parameters
    ----------
    name : str
        A key of `AGGREGATORS`.
    parameters : tuple of (str, float)
        The coefficients by name, in the unit of the scores.
    nan : {"raise", "omit"}
        What a NaN score does: raise, or leave the member out in that row. Infinity always raises.
    min_members : int
        The fewest members that may make up a score, ≥ 1.
    """

    name: str
    parameters: tuple[tuple[str, float], ...] = ()
    nan: NanPolicy = "raise"
    min_members: int = 1

    def __post_init__(self) -> None:
        if self.name not in AGGREGATORS:
            raise OptionError(f"no aggregator {self.name!r}; there are {', '.join(AGGREGATORS)}")
        given = dict(self.parameters)
        wanted = AGGREGATORS[self.name]
        if unknown := [key for key in given if key not in wanted]:
            takes = f"takes {', '.join(wanted)}" if wanted else "takes no coefficient"
            raise OptionError(f"{self.name} {takes}, not {', '.join(map(str, unknown))}")
        if missing := [key for key in wanted if key not in given]:
            raise OptionError(f"{self.name} needs the coefficient {', '.join(missing)}")
        if self.nan not in ("raise", "omit"):
            raise OptionError(f"nan must be 'raise' or 'omit', not {self.nan!r}")
        count: Any = self.min_members
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise OptionError(f"min_members must be a whole number ≥ 1, not {count!r}")
        checked = tuple((key, _coefficient(self.name, key, given[key])) for key in wanted)
        object.__setattr__(self, "parameters", checked)

    def __call__(self, scores: ArrayLike) -> Floats:
        """Aggregate (n_samples, n_members) scores to (n_samples,), in their unit.

        Raises
        ------
        OptionError
            If the scores are no matrix, or have fewer columns than `min_members`.
        NonFiniteScoreError
            If a score is infinite, is NaN against the policy, or the result overflows.
        OneMemberError
            If a spread is asked of a single member.
        """
        rows = self._sorted(score_matrix(scores))
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            result = FORMULAS[self.name][0](rows, **dict(self.parameters))
        if not np.isfinite(result).all():
            row = int(np.flatnonzero(~np.isfinite(result))[0])
            raise NonFiniteScoreError(f"{self} overflows in row {row}; normalise the scores")
        return result

    @property
    def fewest(self) -> int:
        """The fewest scores that make up one: `min_members`, and two where their spread counts."""
        spread = self.name in ("uwo", "lcb") and any(value > 0 for _, value in self.parameters)
        return max(self.min_members, 2 if spread else 1)

    def where_enough(self, scores: ArrayLike) -> Floats:
        """Aggregate as a call does; under ``nan="omit"``, NaN where fewer than `fewest` are left.

        For judgments and reports, which go on without such a sample; a reward does not.
        """
        matrix = score_matrix(scores)
        if self.nan == "raise" or matrix.shape[1] < self.fewest or np.isinf(matrix).any():
            return self(matrix)
        enough = (~np.isnan(matrix)).sum(axis=1) >= self.fewest
        found = np.full(len(matrix), np.nan)
        if enough.any():
            found[enough] = self(matrix[enough])
        return found

    def _sorted(self, scores: Floats) -> Sorted:
        if scores.shape[1] < self.min_members:
            raise OptionError(f"{self} got the scores of {scores.shape[1]} members")
        if (infinite := np.isinf(scores)).any():
            raise NonFiniteScoreError(f"infinite scores: {name_entries(infinite)}")
        missing = np.isnan(scores)
        if self.nan == "raise" and missing.any():
            raise NonFiniteScoreError(
                f"NaN scores: {name_entries(missing)}; nan='omit' leaves such members out"
            )
        counts = np.asarray((~missing).sum(axis=1), dtype=np.int64)
        short = counts < self.min_members
        if short.any():
            raise NonFiniteScoreError(
                f"{int(short.sum())} rows have fewer than min_members={self.min_members} scores "
                f"that are not NaN: {name_entries(missing & short[:, None])}"
            )
        present = np.arange(scores.shape[1]) < counts[:, None]
        return Sorted(np.where(present, np.sort(scores, axis=1), 0.0), present, counts)

    def __str__(self) -> str:
        words = [f"{key}={value!r}" for key, value in self.parameters]
        words += [f"nan={self.nan!r}"] if self.nan != "raise" else []
        words += [f"min_members={self.min_members}"] if self.min_members != 1 else []
        return f"{self.name}({', '.join(words)})"

    def to_json(self) -> dict[str, Any]:
        """Return the aggregator as a JSON object; `from_json` reads it."""
        return {
            "name": self.name,
            "parameters": dict(self.parameters),
            "nan": self.nan,
            "min_members": self.min_members,
        }

    @classmethod
    def from_json(cls, d: Any) -> Aggregator:
        """Read what `to_json` wrote; anything else raises `OptionError`."""
        keys = {"name", "parameters", "nan", "min_members"}
        if not isinstance(d, Mapping) or set(d) != keys or not isinstance(d["parameters"], Mapping):
            raise OptionError(f"an aggregator is an object with {sorted(keys)}, not {d!r}")
        return cls(str(d["name"]), tuple(d["parameters"].items()), d["nan"], d["min_members"])


def make_aggregator(
    name: str, *, nan: NanPolicy = "raise", min_members: int = 1, **coefficients: float
) -> Aggregator:
    """Make an aggregator from its name.

    Parameters
    ----------
    name : str
        A key of `AGGREGATORS`.
    nan : {"raise", "omit"}
        What a NaN score does.
    min_members : int
        The fewest members that may make up a score.
    **coefficients : float
        Every coefficient that the name takes, and no other.

    Returns
    -------
    Aggregator
        The aggregator.

    Raises
    ------
    OptionError
        If the name is unknown, or a coefficient is missing, unknown or out of its range.
    """
    return Aggregator(name, tuple(coefficients.items()), nan, min_members)


def mean() -> Aggregator:
    """Mean of the members: cheap averaging, no protection against shared blind spots [1]_.

    Returns
    -------
    Aggregator
        (1/k) Σ rᵢ.
    """
    return make_aggregator("mean")


def minimum() -> Aggregator:
    """Worst member, Coste et al.'s worst-case optimisation [1]_.

    Returns
    -------
    Aggregator
        min rᵢ.
    """
    return make_aggregator("minimum")


def uwo(lam: float) -> Aggregator:
    """Uncertainty-weighted optimisation: penalises the members' **variance** [1]_.

    Parameters
    ----------
    lam : float
        λ ≥ 0, per normalised unit. Coste et al. use 0.5 for best-of-n and 0.1 for PPO.

    Returns
    -------
    Aggregator
        mean − λ·Var, Var = (1/k) Σ(rᵢ − mean)² (ddof 0).

    Examples
    --------
    >>> float(uwo(lam=0.5)([[1.0, 2.0, 4.0]])[0])
    1.5555555555555558
    """
    return make_aggregator("uwo", lam=lam)


def lcb(kappa: float) -> Aggregator:
    """Lower confidence bound: penalises the members' **standard deviation** [2]_.

    Parameters
    ----------
    kappa : float
        κ ≥ 0, no unit. κ = 1 is Eisenstein et al.'s mean minus std.

    Returns
    -------
    Aggregator
        mean − κ·std (ddof 0).
    """
    return make_aggregator("lcb", kappa=kappa)


def entropic(beta: float) -> Aggregator:
    """Soft minimum, between minimum (β → 0) and mean (β → ∞); never below the minimum [3]_.

    Parameters
    ----------
    beta : float
        β > 0, in normalised units.

    Returns
    -------
    Aggregator
        −β log[(1/k) Σ exp(−rᵢ/β)].
    """
    return make_aggregator("entropic", beta=beta)


def median() -> Aggregator:
    """Median of the members: one broken member does not move it far.

    Returns
    -------
    Aggregator
        The middle score, or the mean of the two in the middle.
    """
    return make_aggregator("median")


def quantile(q: float) -> Aggregator:
    """Interpolate a quantile of the members linearly between ranks, as numpy does.

    Parameters
    ----------
    q : float
        In [0, 1]; 0 is the minimum, ½ the median.

    Returns
    -------
    Aggregator
        The q-quantile.
    """
    return make_aggregator("quantile", q=q)


def cvar(alpha: float) -> Aggregator:
    """Mean of the lowest share of the members: conditional value at risk [4]_.

    Parameters
    ----------
    alpha : float
        In (0, 1], the share of members; a member may count in part. 1 is the mean.

    Returns
    -------
    Aggregator
        Mean of the lowest α·k members.
    """
    return make_aggregator("cvar", alpha=alpha)
