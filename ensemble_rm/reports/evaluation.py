"""How good an ensemble is on judged pairs: single members, their mean, every aggregator.

Before calibration a probability is σ(Δ) of normalised margins; after, σ(Δ/T) with each row's own T,
fitted on the calibration's judgments and never on the pairs that are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ensemble_rm.aggregation.aggregator import (
    Aggregator,
    cvar,
    entropic,
    lcb,
    mean,
    median,
    minimum,
    uwo,
)
from ensemble_rm.aggregation.formulas import Floats
from ensemble_rm.calibration.pairs import ScoredPairs
from ensemble_rm.calibration.temperature import TemperatureFit, fit_temperature
from ensemble_rm.ensemble import RewardEnsemble
from ensemble_rm.errors import CalibrationError, OneMemberError
from ensemble_rm.members.trunk import Progress, silent
from ensemble_rm.metrics import (
    EceNull,
    Interval,
    agreement,
    auroc,
    bootstrap,
    ece,
    ece_null,
    error_auroc,
    smooth_ece,
)
from ensemble_rm.samples import Preferences, require_pairs
from ensemble_rm.uncertainty import margin_correlation, mean_correlation, split_uncertainty


def default_aggregators() -> tuple[Aggregator, ...]:
    """Return the aggregators that an evaluation sets side by side."""
    return (mean(), minimum(), lcb(1.0), uwo(0.5), entropic(1.0), median(), cvar(0.5))


@dataclass(frozen=True)
class Row:
    """One way to a reward, measured.

    Attributes
    ----------
    name : str
        A member's name, or an aggregator with its coefficients.
    kind : {"member", "aggregator"}
    before, after : dict of str to Interval
        Metrics by name; `after` is empty where no temperature could be fitted.
    null_before, null_after : EceNull
        What chance alone makes of the ECE.
    temperature : TemperatureFit, optional
    refusal : str
        Why there is no temperature, where there is none.
    """

    name: str
    kind: str
    before: dict[str, Interval]
    after: dict[str, Interval]
    null_before: EceNull
    null_after: EceNull | None
    temperature: TemperatureFit | None
    refusal: str = ""

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
        return found


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An ensemble on judged pairs.

    Attributes
    ----------
    rows : tuple of Row
        Single members first, then the aggregators.
    chosen : str
        Name of the row of the ensemble's own aggregator.
    pairs, prompts : int
        How many were evaluated.
    probability : ndarray, shape (n_pairs,)
        Of the ensemble's own aggregator; calibrated where it is.
    targets : ndarray, shape (n_pairs,)
    groups : ndarray of int, shape (n_pairs,)
        Prompt of each pair.
    uncertainty : dict of str to ndarray
        What can rank pairs by doubt: ``entropy`` of the probability and, of two members or more,
        ``epistemic``; higher is less sure.
    error_auroc : dict of str to Interval
        How well each of these finds the wrong verdicts.
    margin_correlation : float, optional
        Mean correlation of the members' margins: near 1 they move as a herd.
    longer_first_auroc : float, optional
        How well the longer completion alone predicts the verdict.
    """

    rows: tuple[Row, ...]
    chosen: str
    pairs: int
    prompts: int
    probability: Floats
    targets: Floats
    groups: NDArray[np.int64]
    uncertainty: dict[str, Floats]
    error_auroc: dict[str, Interval]
    margin_correlation: float | None
    longer_first_auroc: float | None = None

    def row(self, name: str) -> Row:
        """Return the row of that name."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return all but the pairs themselves as JSON."""
        return {
            "pairs": self.pairs,
            "prompts": self.prompts,
            "chosen": self.chosen,
            "rows": [row.to_json() for row in self.rows],
            "error_auroc": {k: vars(v) for k, v in self.error_auroc.items()},
            "margin_correlation": self.margin_correlation,
            "longer_first_auroc": self.longer_first_auroc,
        }


def evaluate(
    ensemble: RewardEnsemble,
    test: Preferences,
    *,
    aggregators: Sequence[Aggregator] | None = None,
    draws: int = 500,
    seed: int = 0,
    progress: Progress = silent,
) -> Evaluation:
    """Measure single members, their mean and every aggregator on judged pairs.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Without a calibration there is nothing after calibration, and the rest is measured.
    test : Preferences
        Pairs that neither training nor calibration saw. Their sides are exchanged at random
        first, so that their order tells nothing.
    aggregators : sequence of Aggregator, optional
        Beside the ensemble's own; a usual set where not given.
    draws : int
        Bootstrap samples, over prompts, of each interval.
    seed : int
        Of the sides, the bootstrap and the redrawn labels.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Evaluation
        With intervals at 95 %.

    Raises
    ------
    EmptyDataError
        If there is no pair.
    """
    require_pairs(test, "an evaluation")
    test = test.shuffled_sides(seed=seed)
    scored = ensemble.judge(test, progress=progress)
    evidence = None if ensemble.calibration is None else ensemble.calibration.evidence
    chosen = dict.fromkeys([*(aggregators or default_aggregators()), ensemble.aggregator])
    if scored.members == 1:
        chosen = dict.fromkeys([ensemble.aggregator])
    ways: list[tuple[str, str, Callable[[ScoredPairs], Floats]]] = [
        (name, "member", lambda s, i=i: s.member_margins[:, i])  # type: ignore[misc]
        for i, name in enumerate(ensemble.names)
    ]
    ways += [(str(a), "aggregator", lambda s, a=a: s.margins(a)) for a in chosen]  # type: ignore[misc]
    rows = []
    for done, (name, kind, margins_of) in enumerate(ways):
        progress("measuring", done, len(ways))
        rows.append(_row(name, kind, margins_of, scored, evidence, draws, seed))
    progress("measuring", len(ways), len(ways))
    own = next(row for row in rows if row.name == str(ensemble.aggregator))
    temperature = 1.0 if own.temperature is None else own.temperature.temperature
    p = np.asarray(expit(scored.margins(ensemble.aggregator) / temperature))
    doubts = _doubts(scored, p, ensemble)
    return Evaluation(
        tuple(rows),
        str(ensemble.aggregator),
        len(scored),
        len(np.unique(scored.groups)),
        p,
        scored.targets,
        scored.groups,
        doubts,
        {
            name: bootstrap(
                lambda i, d=doubt: error_auroc(p[i], scored.targets[i], d[i]),  # type: ignore[misc]
                scored.groups,
                draws=draws,
                seed=seed,
            )
            for name, doubt in doubts.items()
        },
        mean_correlation(margin_correlation(scored.member_margins)) if scored.members > 1 else None,
        _length_auroc(test),
    )


def _row(
    name: str,
    kind: str,
    margins_of: Callable[[ScoredPairs], Floats],
    scored: ScoredPairs,
    evidence: ScoredPairs | None,
    draws: int,
    seed: int,
) -> Row:
    margins = margins_of(scored)
    before = np.asarray(expit(margins))
    fit, refusal = None, "the ensemble has no calibration"
    if evidence is not None:
        try:
            fit = fit_temperature(
                margins_of(evidence),
                evidence.targets,
                weights=evidence.weights,
                groups=evidence.groups,
                min_judgments=2,
            )
            refusal = ""
        except CalibrationError as error:
            refusal = str(error)
    after = None if fit is None else np.asarray(expit(margins / fit.temperature))
    return Row(
        name,
        kind,
        _measure(before, scored, draws, seed),
        {} if after is None else _measure(after, scored, draws, seed),
        ece_null(before, seed=seed),
        None if after is None else ece_null(after, seed=seed),
        fit,
        refusal,
    )


def _measure(p: Floats, scored: ScoredPairs, draws: int, seed: int) -> dict[str, Interval]:
    """Return every metric; those that are means over pairs share one bootstrap."""
    y, groups = scored.targets, scored.groups
    per_pair = {
        "accuracy": agreement(p, y),
        "nll": -(y * np.log(np.maximum(p, 1e-300)) + (1 - y) * np.log(np.maximum(1 - p, 1e-300))),
        "brier": (p - y) ** 2,
    }
    found = {
        name: bootstrap(lambda i, v=v: float(v[i].mean()), groups, draws=draws, seed=seed)  # type: ignore[misc]
        for name, v in per_pair.items()
    }
    for name, metric in (("ece", ece), ("smooth_ece", smooth_ece)):
        few = min(draws, 100) if name == "smooth_ece" else draws
        found[name] = bootstrap(
            lambda i, m=metric: m(p[i], y[i]),  # type: ignore[misc]
            groups,
            draws=few,
            seed=seed,
        )
    return found


def _doubts(scored: ScoredPairs, p: Floats, ensemble: RewardEnsemble) -> dict[str, Floats]:
    found = {"entropy": -np.abs(p - 0.5)}
    if ensemble.calibration is not None:
        try:
            split = split_uncertainty(
                scored.member_margins,
                mixture_temperature=ensemble.calibration.mixture_temperature,
            )
        except OneMemberError:
            return found
        found["epistemic"] = split.epistemic
    return found


def _length_auroc(test: Preferences) -> float | None:
    longer = np.array([len(pair.chosen) - len(pair.rejected) for pair in test], dtype=np.float64)
    y = test.targets
    decided = y != 0.5
    area = auroc(longer[decided], y[decided] > 0.5)
    return None if np.isnan(area) else area
