"""What an aggregator is made of: a formula over sorted scores, its coefficients, and its name.

A new aggregator is one `Rule`, registered once. Nothing else needs to know about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.errors import OneMemberError, OptionError


@dataclass(frozen=True, slots=True)
class SortedScores:
    """The scores that a formula sees: each row ascending, with the members' weights.

    Sorting makes the result independent of the members' order to the last bit. Missing members,
    and members of weight 0, come last and have the weight 0.

    Parameters
    ----------
    values : ndarray, shape (n_samples, n_members)
        Scores; 0 where a member is missing.
    weights : ndarray, shape (n_samples, n_members)
        Relative weights, > 0 where a member is present: all 1 where none were given. Formulas
        divide by their sum, so the weights of a row need not sum to 1.
    """

    values: Floats
    weights: Floats

    @property
    def present(self) -> NDArray[np.bool_]:
        """Whether an entry is a member's score, shape (n_samples, n_members)."""
        return self.weights > 0

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many members each row has, shape (n_samples,), ≥ 1."""
        return np.asarray(self.present.sum(axis=1), dtype=np.int64)

    @property
    def total(self) -> Floats:
        """Sum of the weights of each row, shape (n_samples,)."""
        return np.asarray(self.weights.sum(axis=1))

    def average(self, terms: Floats) -> Floats:
        """Return Σ wᵢtᵢ / Σ wᵢ of (n_samples, n_members) terms, shape (n_samples,)."""
        weighted: Floats = np.where(self.present, self.weights * terms, 0.0).sum(axis=1)
        return weighted / self.total

    def lowest(self) -> Floats:
        """Return the lowest score of each row, shape (n_samples,)."""
        return np.asarray(self.values[:, 0])

    def highest(self) -> Floats:
        """Return the highest score of each row, shape (n_samples,)."""
        return self.values[np.arange(len(self.values)), self.counts - 1]

    def mean(self) -> Floats:
        """Return Σ wᵢrᵢ / Σ wᵢ, shape (n_samples,)."""
        # Rounding alone could leave the members' range: [.1, .1, .1] has the mean .1 + 1 ulp.
        return np.clip(self.average(self.values), self.lowest(), self.highest())

    def variance(self) -> Floats:
        """Return Σ wᵢ(rᵢ − mean)² / Σ wᵢ (ddof 0), shape (n_samples,).

        Raises
        ------
        OneMemberError
            If a row has a single member.
        """
        single = np.flatnonzero(self.counts < 2)
        if single.size:
            raise OneMemberError(
                f"the spread of the members needs at least 2 of them, and row {single[0]} has one "
                f"({single.size} such rows of {len(self.values)}); use a coefficient of 0, or more "
                "members"
            )
        return self.average((self.values - self.mean()[:, None]) ** 2)

    def mean_between(self, start: Floats, end: Floats) -> Floats:
        """Return the mean of the members between two points of the cumulative weight.

        Lay the members of a row end to end, lowest score first, each as long as its weight: this
        is the mean height over [start, end). A member at a boundary counts in part.

        Parameters
        ----------
        start, end : ndarray, shape (n_samples,)
            0 ≤ start < end ≤ `total`.
        """
        upper = np.cumsum(self.weights, axis=1)
        lower = np.concatenate([np.zeros((len(upper), 1)), upper[:, :-1]], axis=1)
        overlap = np.minimum(upper, end[:, None]) - np.maximum(lower, start[:, None])
        overlap = np.where(self.present, np.maximum(overlap, 0.0), 0.0)
        # Divided first: a window far narrower than one member must not underflow.
        shares = overlap / overlap.sum(axis=1, keepdims=True)
        inside: Floats = (shares * self.values).sum(axis=1)
        return np.clip(inside, self.lowest(), self.highest())


@dataclass(frozen=True)
class Coefficient:
    """One coefficient of a formula, with its domain.

    Parameters
    ----------
    name : str
        The formula's keyword.
    domain : str
        What is allowed, in words, for messages: ``"a finite number ≥ 0"``.
    allows : callable
        Whether a finite float is in the domain.
    help : str
        What the coefficient is, for a command line.
    bounds : tuple of (str, float)
        The domain in JSON Schema's words, for a server's description: ``("minimum", 0)``.
    """

    name: str
    domain: str
    allows: Callable[[float], bool]
    help: str = ""
    bounds: tuple[tuple[str, float], ...] = ()

    def check(self, rule: str, value: object) -> float:
        """Return the value as a float.

        Raises
        ------
        OptionError
            If it is not a finite number in the domain.
        """
        number = isinstance(value, int | float | np.integer | np.floating)
        if isinstance(value, bool) or not number:
            raise OptionError(f"{rule}: {self.name} must be {self.domain}, not {value!r}")
        result = float(value)  # type: ignore[arg-type]
        if not math.isfinite(result) or not self.allows(result):
            raise OptionError(f"{rule}: {self.name} must be {self.domain}, not {value!r}")
        return result + 0.0  # −0 becomes 0


Formula: TypeAlias = Callable[..., Floats]


@dataclass(frozen=True)
class Rule:
    """One way to aggregate: a name, a formula and the coefficients that it takes.

    Parameters
    ----------
    name : str
        As in `make_aggregator` and in saved ensembles.
    formula : callable
        ``formula(scores: SortedScores, **coefficients) -> ndarray of shape (n_samples,)``. Uses
        `SortedScores.weights`, so that members' weights and missing members work.
    coefficients : tuple of Coefficient
        In the order in which they are shown.
    spread : bool
        Whether a coefficient above 0 needs at least two members per row.
    """

    name: str
    formula: Formula
    coefficients: tuple[Coefficient, ...] = ()
    spread: bool = False


RULES: dict[str, Rule] = {}
"""Every registered rule by its name."""


def register(rule: Rule) -> Rule:
    """Make a rule known to `make_aggregator` and to saved ensembles.

    Parameters
    ----------
    rule : Rule
        Register it before an ensemble that uses it is loaded.

    Returns
    -------
    Rule
        The same one.

    Raises
    ------
    OptionError
        If another rule has the name.
    """
    if RULES.setdefault(rule.name, rule) != rule:
        raise OptionError(f"an aggregator {rule.name!r} is registered already; use another name")
    return rule


def find_rule(name: str) -> Rule:
    """Return the rule of a name.

    Raises
    ------
    OptionError
        If there is none.
    """
    if name not in RULES:
        raise OptionError(f"no aggregator {name!r}; choose one of {', '.join(RULES)}")
    return RULES[name]
