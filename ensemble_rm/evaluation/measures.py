"""What an evaluation measures: one row a way to a reward, one row a subset of the pairs.

Accuracy, NLL and Brier are means weighted by the pairs' weights; the calibration errors, which have
no weighted null, count each pair once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.methods.temperature import TemperatureFit, fit_temperature
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.errors import CalibrationError
from ensemble_rm.metrics import (
    EceNull,
    Interval,
    agreement,
    bootstrap,
    ece,
    ece_null,
    pair_nll,
    smooth_ece,
)


@dataclass(frozen=True)
class Row:
    """One way to a reward, measured.

    Attributes
    ----------
    name : str
        A member's name, or an aggregator with its coefficients.
    kind : {"member", "aggregator"}
    before, after : dict of str to Interval
        Metrics by name; `after` is empty where no temperature could be fitted, both where a member
        scored nothing.
    null_before, null_after : EceNull, optional
        What chance alone makes of the ECE.
    temperature : TemperatureFit, optional
    refusal : str
        Why there is no temperature, where there is none.
    missing : int
        Pairs that a member did not score on both sides; it is measured on the others.
    """

    name: str
    kind: str
    before: dict[str, Interval]
    after: dict[str, Interval]
    null_before: EceNull | None
    null_after: EceNull | None
    temperature: TemperatureFit | None
    refusal: str = ""
    missing: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON."""
        found: dict[str, Any] = {"name": self.name, "kind": self.kind}
        for stage, metrics, null in (
            ("before", self.before, self.null_before),
            ("after", self.after, self.null_after),
        ):
            found[stage] = {k: vars(interval) for k, interval in metrics.items()}
            if null is not None:
                found[stage]["ece_null"] = vars(null)
        found["temperature"] = self.temperature and vars(self.temperature)
        if self.refusal:
            found["refusal"] = self.refusal
        if self.missing:
            found["missing"] = self.missing
        return found


@dataclass(frozen=True)
class SubsetRow:
    """The ensemble's own aggregator on one subset of the pairs.

    Attributes
    ----------
    name : str
    pairs, prompts : int
        How many there are.
    metrics : dict of str to Interval
        By name, calibrated where the ensemble is.
    null : EceNull
        What chance alone makes of the ECE.
    temperature : float, optional
        T that the subset's probabilities have; none without a calibration, or under a curve.
    """

    name: str
    pairs: int
    prompts: int
    metrics: dict[str, Interval]
    null: EceNull
    temperature: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON."""
        metrics: dict[str, Any] = {k: vars(v) for k, v in self.metrics.items()}
        return {
            "name": self.name,
            "pairs": self.pairs,
            "prompts": self.prompts,
            "metrics": metrics | {"ece_null": vars(self.null)},
            "temperature": self.temperature,
        }


def measure_row(
    name: str,
    kind: str,
    margins_of: Callable[[ScoredPairs], Floats],
    scored: ScoredPairs,
    evidence: ScoredPairs | None,
    *,
    calibrated: Floats | None,
    draws: int,
    seed: int,
) -> Row:
    """Measure one way to a reward, before and after calibration.

    Parameters
    ----------
    name, kind : str
        Of the row.
    margins_of : callable
        Pairs to margins, shape (n_pairs,).
    scored : ScoredPairs
        The pairs to measure on.
    evidence : ScoredPairs, optional
        The calibration's judgments, which the row's temperature is fitted on.
    calibrated : ndarray, shape (n_pairs,), optional
        Probabilities after calibration where they are known; σ(Δ/T) where not given.
    draws, seed : int
        Of the bootstrap.
    """
    margins = margins_of(scored)
    there = ~np.isnan(margins)
    missing = int((~there).sum())
    if missing == len(margins):
        return Row(name, kind, {}, {}, None, None, None, f"{name} scored no pair", missing)
    if missing:  # a member is measured on what it scored
        scored, margins = scored.take(np.flatnonzero(there)), margins[there]
    before = np.asarray(expit(margins))
    fit, refusal = None, "the ensemble has no calibration"
    if evidence is not None:
        judged = margins_of(evidence)
        known = ~np.isnan(judged)
        try:
            fit = fit_temperature(
                judged[known],
                evidence.targets[known],
                weights=evidence.weights[known],
                groups=evidence.groups[known],
                min_judgments=2,
            )
            refusal = ""
        except CalibrationError as error:
            refusal = str(error)
    after = calibrated
    if after is None and fit is not None:
        after = np.asarray(expit(margins / fit.temperature))
    return Row(
        name,
        kind,
        _measure(before, scored, draws, seed),
        {} if after is None else _measure(after, scored, draws, seed),
        ece_null(before, seed=seed),
        None if after is None else ece_null(after, seed=seed),
        fit,
        refusal,
        missing,
    )


def measure_subsets(
    scored: ScoredPairs,
    p: Floats,
    *,
    temperature_of: Callable[[str], float | None],
    draws: int,
    seed: int,
) -> tuple[SubsetRow, ...]:
    """Measure probabilities on every subset that the pairs name, by name."""
    subsets = np.array(scored.subsets, dtype=object)
    found = []
    for name in scored.subset_names:
        rows = np.flatnonzero(subsets == name)
        part = scored.take(rows)
        found.append(
            SubsetRow(
                name,
                len(part),
                len(np.unique(part.groups)),
                _measure(p[rows], part, draws, seed),
                ece_null(p[rows], seed=seed),
                temperature_of(name),
            )
        )
    return tuple(found)


def measure_gain(
    scored: ScoredPairs,
    members: list[TemperatureFit],
    pooled: TemperatureFit,
    margins: Floats,
    *,
    draws: int,
    seed: int,
) -> Interval:
    """Say what pooling buys: mean member NLL − pooled NLL in nats, each at its own held-out T.

    On the pairs that every member scored.

    Parameters
    ----------
    scored : ScoredPairs
        The pairs to measure on.
    members : list of TemperatureFit
        One a member.
    pooled : TemperatureFit
        Of the aggregated margin.
    margins : ndarray, shape (n_pairs,)
        The aggregated margin.
    draws, seed : int
        Of the bootstrap.
    """
    whole = np.flatnonzero(~np.isnan(scored.member_margins).any(axis=1))
    scored, margins = scored.take(whole), margins[whole]
    y = scored.targets
    own = [
        pair_nll(expit(scored.member_margins[:, i] / fit.temperature), y)
        for i, fit in enumerate(members)
    ]
    gain = np.mean(own, axis=0) - pair_nll(expit(margins / pooled.temperature), y)
    return _mean_interval(gain, scored, draws, seed)


def _mean_interval(values: Floats, scored: ScoredPairs, draws: int, seed: int) -> Interval:
    w = scored.weights
    return bootstrap(
        lambda i: float((w[i] * values[i]).sum() / w[i].sum()),
        scored.groups,
        draws=draws,
        seed=seed,
    )


def _measure(p: Floats, scored: ScoredPairs, draws: int, seed: int) -> dict[str, Interval]:
    """Return every metric with its interval over prompts."""
    y = scored.targets
    per_pair = {"accuracy": agreement(p, y), "nll": pair_nll(p, y), "brier": (p - y) ** 2}
    found = {k: _mean_interval(v, scored, draws, seed) for k, v in per_pair.items()}
    for name, metric in (("ece", ece), ("smooth_ece", smooth_ece)):
        few = min(draws, 100) if name == "smooth_ece" else draws
        found[name] = bootstrap(
            lambda i, m=metric: m(p[i], y[i]),  # type: ignore[misc]
            scored.groups,
            draws=few,
            seed=seed,
        )
    return found
