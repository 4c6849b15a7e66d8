"""Members' scores to one score: the aggregator and what it does about missing members.

Knows arrays of floats; knows nothing of members, margins, temperatures or judgments. Coefficients
act in the unit of the scores: normalise the members first, or λ, κ and β change their meaning with
every version of a member.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ensemble_rm.aggregation.rule import SortedScores, find_rule
from ensemble_rm.arrays import Floats
from ensemble_rm.errors import NonFiniteScoreError, OptionError
from ensemble_rm.saved_json import at, from_row

NanPolicy: TypeAlias = Literal["raise", "omit"]

_SHOWN = 10  # bad entries that a message names


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


def name_entries(bad: NDArray[np.bool_], names: Sequence[str] = ()) -> str:
    """Return the rows and members where `bad` is set, for a message.

    Parameters
    ----------
    bad : ndarray of bool, shape (n_samples, n_members)
    names : sequence of str, optional
        The members' names; without them members are numbered.
    """
    entries = np.argwhere(bad)
    shown = ", ".join(
        f"row {row} member {names[member] if names else member}" for row, member in entries[:_SHOWN]
    )
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return shown + more


@dataclass(frozen=True)
class Aggregator:
    """How the members' scores of a sample become one score.

    Two aggregators are equal if their rule, coefficients, weights and policy for missing members
    are. Use the factories (`mean`, `lcb`, …) or, with a name from a command line,
    `make_aggregator`.

    Parameters
    ----------
    name : str
        A registered rule, see `register`.
    parameters : tuple of (str, float)
        The coefficients by name, in the unit of the scores.
    nan : {"raise", "omit"}
        What a NaN score does: raise, or leave the member out in that row; the weights of the
        others then count in proportion. Infinity always raises.
    min_members : int
        The fewest members that may make up a score, ≥ 1.
    weights : tuple of (str, float)
        Weight of each member by its name, ≥ 0, at least one above 0; scaled to sum 1. A member of
        weight 0 is left out: its score is not read, not even where it is NaN. Empty: every member
        counts alike.
    members : tuple of str
        The members in the order of the columns, which an aggregator with weights needs to be
        called. `RewardEnsemble` fills them in, see `bind`.
    """

    name: str
    parameters: tuple[tuple[str, float], ...] = ()
    nan: NanPolicy = "raise"
    min_members: int = 1
    weights: tuple[tuple[str, float], ...] = ()
    members: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        rule = find_rule(self.name)
        given = dict(self.parameters)
        wanted = [coefficient.name for coefficient in rule.coefficients]
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
        checked = tuple((c.name, c.check(self.name, given[c.name])) for c in rule.coefficients)
        object.__setattr__(self, "parameters", checked)
        object.__setattr__(self, "weights", _scaled_weights(self.weights))
        object.__setattr__(self, "members", tuple(self.members))
        if self.weights and self.members:
            _require_same_names(dict(self.weights), self.members)

    def bind(self, members: Sequence[str]) -> Aggregator:
        """Return the same aggregator for scores whose columns are these members.

        Parameters
        ----------
        members : sequence of str
            The members' names in the order of the columns.

        Returns
        -------
        Aggregator
            Equal to this one. Without weights names do not matter, and it is this one.

        Raises
        ------
        OptionError
            If a weight names no member, or a member has no weight.
        """
        if not self.weights or self.members == tuple(members):
            return self
        return replace(self, members=tuple(members))

    def with_rule(self, name: str, **coefficients: float) -> Aggregator:
        """Return another rule over the same weights, with the same policy for missing members.

        Parameters
        ----------
        name : str
            A registered rule.
        **coefficients : float
            Every coefficient that it takes.
        """
        return replace(self, name=name, parameters=tuple(coefficients.items()))

    def __call__(self, scores: ArrayLike) -> Floats:
        """Aggregate (n_samples, n_members) scores to (n_samples,), in their unit.

        Raises
        ------
        OptionError
            If the scores are no matrix, have fewer columns than `min_members`, or are not those of
            the members that have weights.
        NonFiniteScoreError
            If a score is infinite, is NaN against the policy, or the result overflows.
        OneMemberError
            If the rule needs the spread of the members and there is a single one.
        """
        rows = self._sorted(score_matrix(scores))
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            result = find_rule(self.name).formula(rows, **dict(self.parameters))
        if result.shape != (len(rows.values),):
            raise OptionError(
                f"the formula of {self.name!r} returned the shape {result.shape} for "
                f"{len(rows.values)} samples; return one score per row"
            )
        if not np.isfinite(result).all():
            row = int(np.flatnonzero(~np.isfinite(result))[0])
            raise NonFiniteScoreError(f"{self} overflows in row {row}; normalise the scores")
        return result

    @property
    def fewest(self) -> int:
        """The fewest scores that a row needs: `min_members`, and two where their spread counts."""
        spread = find_rule(self.name).spread and any(value > 0 for _, value in self.parameters)
        return max(self.min_members, 2 if spread else 1)

    def where_enough(self, scores: ArrayLike) -> Floats:
        """Aggregate as a call does; under ``nan="omit"``, NaN for rows with too few scores.

        A row needs `fewest` scores. For judgments and reports, which go on without such a sample;
        a reward does not.
        """
        matrix = score_matrix(scores)
        used = self._column_weights(matrix.shape[1]) > 0
        if self.nan == "raise" or used.sum() < self.fewest or np.isinf(matrix[:, used]).any():
            return self(matrix)
        enough = (~np.isnan(matrix[:, used])).sum(axis=1) >= self.fewest
        result = np.full(len(matrix), np.nan)
        if enough.any():
            result[enough] = self(matrix[enough])
        return result

    def _column_weights(self, columns: int) -> Floats:
        """Return one weight per column, 1 each where none were given."""
        if not self.weights:
            return np.ones(columns)
        if not self.members:
            raise OptionError(
                f"{self} needs to know which column is which member; call bind(names), or give it "
                "to a RewardEnsemble"
            )
        if len(self.members) != columns:
            raise OptionError(f"{self} got {columns} columns for the members {self.members}")
        weights = dict(self.weights)
        return np.array([weights[name] for name in self.members])

    def _sorted(self, scores: Floats) -> SortedScores:
        weights = self._column_weights(scores.shape[1])
        used = weights > 0
        if used.sum() < self.min_members:
            raise OptionError(f"{self} got the scores of {int(used.sum())} members")
        if (infinite := np.isinf(scores) & used).any():
            raise NonFiniteScoreError(f"infinite scores: {name_entries(infinite, self.members)}")
        missing = np.isnan(scores) & used
        if self.nan == "raise" and missing.any():
            raise NonFiniteScoreError(
                f"NaN scores: {name_entries(missing, self.members)}; nan='omit' leaves such "
                "members out"
            )
        present = used & ~missing
        short = present.sum(axis=1) < self.min_members
        if short.any():
            raise NonFiniteScoreError(
                f"{int(short.sum())} rows have fewer than min_members={self.min_members} scores "
                f"that are not NaN: {name_entries(missing & short[:, None], self.members)}"
            )
        # Ascending with what is left out last. Ties are ordered by weight, so that the order of
        # the columns cannot change even the rounding.
        keys = np.where(present, scores, np.inf)
        if self.weights:
            order = np.lexsort((np.broadcast_to(weights, keys.shape), keys), axis=1)
            ordered = np.where(present, weights, 0.0)[np.arange(len(keys))[:, None], order]
        else:
            ordered = np.arange(scores.shape[1]) < present.sum(axis=1)[:, None]
        values = np.sort(keys, axis=1)
        return SortedScores(np.where(ordered > 0, values, 0.0), ordered.astype(np.float64))

    def __str__(self) -> str:
        words = [f"{key}={value!r}" for key, value in self.parameters]
        words += [f"nan={self.nan!r}"] if self.nan != "raise" else []
        words += [f"min_members={self.min_members}"] if self.min_members != 1 else []
        if self.weights:
            shown = ", ".join(f"{name!r}: {weight:.6g}" for name, weight in self.weights)
            words.append(f"weights={{{shown}}}")
        return f"{self.name}({', '.join(words)})"

    def to_json(self) -> dict[str, Any]:
        """Return the aggregator as a JSON object; `from_json` reads it."""
        d: dict[str, Any] = {
            "name": self.name,
            "parameters": dict(self.parameters),
            "nan": self.nan,
            "min_members": self.min_members,
        }
        if self.weights:  # without any the object, and every digest of it, is as of old
            d |= {"weights": dict(self.weights), "members": [*self.members]}
        return d

    @classmethod
    def from_json(cls, d: Any) -> Aggregator:
        """Read what `to_json` wrote; anything else raises `SchemaError`."""
        row = from_row(_AggregatorRow, d)
        with at():
            return cls(
                row.name,
                tuple(row.parameters.items()),
                row.nan,
                row.min_members,
                tuple(row.weights.items()),
                row.members,
            )


@dataclass(frozen=True, slots=True)
class _AggregatorRow:
    """An aggregator as JSON: objects where `Aggregator` has pairs."""

    name: str
    parameters: Mapping[str, float]
    nan: NanPolicy
    min_members: int
    weights: Mapping[str, float] = field(default_factory=dict)
    members: tuple[str, ...] = ()


def _scaled_weights(weights: Any) -> tuple[tuple[str, float], ...]:
    """Check members' weights; return them by name, scaled to sum 1."""
    if not weights:
        return ()
    if not all(isinstance(name, str) for name, _ in weights):
        raise OptionError(f"weights are by member name, not {dict(weights)!r}")
    named = sorted(weights, key=lambda entry: entry[0])
    if len(dict(named)) < len(named):
        raise OptionError(f"weights name a member twice: {[name for name, _ in named]}")
    for name, weight in named:
        number = isinstance(weight, int | float | np.integer | np.floating)
        if isinstance(weight, bool) or not number or not math.isfinite(weight) or weight < 0:
            raise OptionError(
                f"the weight of member {name!r} must be a finite number ≥ 0, not {weight!r}"
            )
    values = [float(weight) for _, weight in named]
    if not any(values):
        raise OptionError(f"at least one weight must be above 0: {dict(named)}")
    # Weights that sum to 1 stay as they are, so that what is saved loads as the same numbers.
    if max(values) > 1 or abs(math.fsum(values) - 1) > 1e-12:
        exponent = math.frexp(max(values))[1]  # a power of two: no rounding, and no overflow
        values = [math.ldexp(value, -exponent) for value in values]
        total = math.fsum(values)
        values = [value / total for value in values]
    return tuple((name, value) for (name, _), value in zip(named, values, strict=True))


def _require_same_names(weights: Mapping[str, float], members: Sequence[str]) -> None:
    if unknown := [name for name in weights if name not in members]:
        raise OptionError(
            f"weights name {', '.join(map(repr, unknown))}, and the members are "
            f"{', '.join(map(repr, members))}"
        )
    if missing := [name for name in members if name not in weights]:
        raise OptionError(
            f"no weight for {', '.join(map(repr, missing))}; name every member, with weight 0 to "
            "leave one out"
        )


def make_aggregator(
    name: str,
    *,
    nan: NanPolicy = "raise",
    min_members: int = 1,
    weights: Mapping[str, float] | None = None,
    **coefficients: float,
) -> Aggregator:
    """Make an aggregator from its name.

    Parameters
    ----------
    name : str
        A registered rule: ``"mean"``, ``"minimum"``, ``"uwo"``, ``"lcb"``, ``"entropic"``,
        ``"median"``, ``"quantile"``, ``"cvar"``, or one of your own, see `register`.
    nan : {"raise", "omit"}
        What a NaN score does.
    min_members : int
        The fewest members that may make up a score.
    weights : mapping of str to float, optional
        Weight of each member by its name: finite, ≥ 0, at least one above 0; scaled to sum 1. The
        ensemble that takes the aggregator must have exactly these members.
    **coefficients : float
        Every coefficient that the rule takes, and no other.

    Returns
    -------
    Aggregator
        Equal for weights of equal proportions, up to rounding.

    Raises
    ------
    OptionError
        If the name is unknown, a coefficient is missing, unknown or out of its range, or a weight
        is not a finite number ≥ 0.
    """
    if weights is not None and not weights:
        raise OptionError("weights is empty; name every member, or leave weights out")
    return Aggregator(
        name,
        tuple(coefficients.items()),
        nan,
        min_members,
        () if weights is None else tuple(weights.items()),
    )
