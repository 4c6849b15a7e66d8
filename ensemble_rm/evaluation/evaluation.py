"""Evaluate an ensemble on judged pairs: every member and several aggregators.

Before calibration a probability is σ(Δ) of normalised margins; after it σ(Δ/T) with each row's own
T, fitted on the calibration's judgments and never on the evaluated pairs. The row of the ensemble's
own aggregator uses its calibration, including a curve or the temperatures of subsets.

Accuracy, NLL and Brier score are weighted by the pairs' weights. The calibration errors count each
pair once, since a weighted ECE has no null distribution to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from ensemble_rm.aggregation.aggregator import Aggregator, make_aggregator
from ensemble_rm.aggregation.rule import RULES
from ensemble_rm.aggregation.rules.cvar import cvar
from ensemble_rm.aggregation.rules.entropic import entropic
from ensemble_rm.aggregation.rules.lcb import lcb
from ensemble_rm.aggregation.rules.mean import mean
from ensemble_rm.aggregation.rules.median import median
from ensemble_rm.aggregation.rules.minimum import minimum
from ensemble_rm.aggregation.rules.uwo import uwo
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.methods.temperature import TemperatureFit, fit_temperature
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.data.samples import Preferences, require_pairs
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import CalibrationError, NonFiniteScoreError, OneMemberError
from ensemble_rm.metrics import (
    EceNull,
    Interval,
    agreement,
    auroc,
    bootstrap,
    ece,
    ece_null,
    error_auroc,
    pair_nll,
    smooth_ece,
)
from ensemble_rm.progress import Progress, silent
from ensemble_rm.uncertainty.disagreement import (
    margin_correlation,
    mean_correlation,
    split_uncertainty,
    unknown_as_most,
)


def default_aggregators(like: Aggregator | None = None) -> tuple[Aggregator, ...]:
    """Return the aggregators that an evaluation compares by default.

    Registered rules without a coefficient are among them; those with one have no default value of
    it, so they are compared where they are given.

    Parameters
    ----------
    like : Aggregator, optional
        They take its policy for missing members and its member weights.
    """
    every: tuple[Aggregator, ...] = (
        mean(),
        minimum(),
        lcb(1.0),
        uwo(0.5),
        entropic(1.0),
        median(),
        cvar(0.5),
    )
    known = {a.name for a in every}
    plain = (rule.name for rule in RULES.values() if not rule.coefficients)
    every += tuple(make_aggregator(name) for name in plain if name not in known)
    if like is None:
        return every
    return tuple(like.with_rule(a.name, **dict(a.parameters)) for a in every)


@dataclass(frozen=True)
class Row:
    """Metrics of one member or one aggregator.

    Attributes
    ----------
    name : str
        A member's name, or an aggregator with its coefficients.
    kind : {"member", "aggregator"}
    before, after : dict of str to Interval
        Metrics by name. `after` is empty where no temperature could be fitted; both are empty where
        a member scored no pair.
    null_before, null_after : EceNull, optional
        The ECE that chance alone gives.
    temperature : TemperatureFit, optional
    refusal : str
        Why there is no temperature; empty where there is one.
    missing : int
        Number of pairs that a member did not score on both sides; its metrics are of the others.
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
        row: dict[str, Any] = {"name": self.name, "kind": self.kind}
        for stage, metrics, null in (
            ("before", self.before, self.null_before),
            ("after", self.after, self.null_after),
        ):
            row[stage] = {k: vars(interval) for k, interval in metrics.items()}
            if null is not None:
                row[stage]["ece_null"] = vars(null)
        row["temperature"] = self.temperature and vars(self.temperature)
        if self.refusal:
            row["refusal"] = self.refusal
        if self.missing:
            row["missing"] = self.missing
        return row


@dataclass(frozen=True)
class SubsetRow:
    """Metrics of the ensemble's own aggregator on one subset of the pairs.

    Attributes
    ----------
    name : str
    pairs, prompts : int
        Number of pairs, and of their prompts.
    metrics : dict of str to Interval
        Metrics by name, calibrated where the ensemble is.
    null : EceNull
        The ECE that chance alone gives.
    temperature : float, optional
        T of the subset's probabilities; None without a calibration, or under a curve.
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
        Number of evaluated pairs, and of their prompts.
    probability : ndarray, shape (n_pairs,)
        P(first is preferred) by the ensemble's own aggregator; calibrated where it is.
    targets : ndarray, shape (n_pairs,)
    groups : ndarray of int, shape (n_pairs,)
        Prompt of each pair.
    uncertainty : dict of str to ndarray
        Uncertainty of each pair: ``entropy`` of the probability and, with two members or more,
        ``epistemic``; higher is less certain.
    error_auroc : dict of str to Interval
        AUROC of each of these as a detector of wrong pairs.
    margin_correlation : float, optional
        Mean correlation of the members' margins; near 1 the members hardly differ.
    longer_first_auroc : float, optional
        AUROC of the completions' length alone as a predictor of the verdict.
    subsets : tuple of SubsetRow
        The ensemble's own aggregator on each subset of the pairs.
    unrewarded : int
        Number of further pairs that were left out, since too few members scored a side.
    pooling_gain : Interval, optional
        Mean member NLL − NLL of the own aggregator's margin in nats, each at its own temperature.
        None where one of them has no temperature.
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
    subsets: tuple[SubsetRow, ...] = ()
    pooling_gain: Interval | None = None
    unrewarded: int = 0

    def row(self, name: str) -> Row:
        """Return the row of a name."""
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the arrays of pairs as JSON."""
        return {
            "pairs": self.pairs,
            "prompts": self.prompts,
            "chosen": self.chosen,
            "unrewarded": self.unrewarded,
            "rows": [row.to_json() for row in self.rows],
            "error_auroc": {k: vars(v) for k, v in self.error_auroc.items()},
            "margin_correlation": self.margin_correlation,
            "longer_first_auroc": self.longer_first_auroc,
            "subsets": [row.to_json() for row in self.subsets],
            "pooling_gain": self.pooling_gain and vars(self.pooling_gain),
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
    """Evaluate every member and several aggregators on judged pairs.

    Parameters
    ----------
    ensemble : RewardEnsemble
        Without a calibration only the metrics before calibration are computed.
    test : Preferences
        Pairs that neither training nor calibration saw. Their sides are swapped at random first, so
        that the order of the sides says nothing. Weights count in accuracy, NLL and Brier score.
    aggregators : sequence of Aggregator, optional
        Aggregators to compare with the ensemble's own (default: `default_aggregators`).
    draws : int
        Bootstrap draws over prompts per interval.
    seed : int
        Seed of the sides, the bootstrap and the redrawn labels.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Evaluation
        With 95 % intervals.

    Raises
    ------
    DataError
        If there is no pair.
    NonFiniteScoreError
        If no pair has a reward, or a score is NaN against the aggregator's policy.
    """
    require_pairs(test, "an evaluation")
    # Data sets name the better side first; a score that favours the first would look right.
    test = test.shuffled_sides(seed=seed)
    test, scored, unrewarded = _rewarded(ensemble, test, progress)
    evidence = None if ensemble.calibration is None else ensemble.calibration.evidence
    others = [a.bind(ensemble.names) for a in aggregators or ()]
    # Comparable rows: the default rules take over the ensemble's NaN policy and weights.
    others = others or [*default_aggregators(ensemble.aggregator)]
    # dict.fromkeys keeps the order and drops the ensemble's own if it is among the defaults.
    chosen = dict.fromkeys([*others, ensemble.aggregator])
    if scored.members == 1:
        # Every aggregator of one member is that member.
        chosen = dict.fromkeys([ensemble.aggregator])
    ways: list[tuple[str, str, Callable[[ScoredPairs], Floats]]] = [
        (name, "member", lambda s, i=i: s.member_margins[:, i])  # type: ignore[misc]
        for i, name in enumerate(ensemble.names)
    ]
    ways += [(str(a), "aggregator", lambda s, a=a: s.margins(a)) for a in chosen]  # type: ignore[misc]
    known = _calibrated(ensemble, scored)
    rows = []
    for done, (name, kind, margins_of) in enumerate(ways):
        progress("measuring", done, len(ways))
        # The ensemble's own row is measured under its own calibration, all others under a fitted T.
        given = known if name == str(ensemble.aggregator) else None
        rows.append(
            measure_row(
                name, kind, margins_of, scored, evidence, calibrated=given, draws=draws, seed=seed
            )
        )
    progress("measuring", len(ways), len(ways))
    own = next(row for row in rows if row.name == str(ensemble.aggregator))
    # Without a calibration that applies, the own row's T stands in for it.
    p = known if known is not None else _own_probability(own, scored, ensemble)
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
        _correlation(scored) if scored.members > 1 else None,
        _length_auroc(test),
        measure_subsets(
            scored, p, temperature_of=_subset_temperature(ensemble, own), draws=draws, seed=seed
        ),
        _pooling_gain(rows, own, scored, ensemble, draws, seed),
        unrewarded,
    )


def _rewarded(
    ensemble: RewardEnsemble, test: Preferences, progress: Progress
) -> tuple[Preferences, ScoredPairs, int]:
    """Return the pairs that have a reward, their scores, and how many pairs have none."""
    scored = ensemble.judge(test, progress=progress)
    rows = np.flatnonzero(~np.isnan(scored.margins(ensemble.aggregator)))
    if len(rows) == 0:
        raise NonFiniteScoreError(
            f"none of the {len(test)} pairs has a reward: {ensemble.aggregator} needs "
            f"{ensemble.aggregator.fewest} members that score both sides"
        )
    if len(rows) == len(test):
        return test, scored, 0
    return test.take(rows), scored.take(rows), len(test) - len(rows)


def _calibrated(ensemble: RewardEnsemble, scored: ScoredPairs) -> Floats | None:
    """Return the probabilities of the ensemble's calibration; None without one that applies."""
    calibration = ensemble.calibration
    if calibration is None or calibration.aggregator != ensemble.aggregator:
        return None
    return calibration.probability(scored.margins(ensemble.aggregator), subsets=scored.subsets)


def _own_probability(own: Row, scored: ScoredPairs, ensemble: RewardEnsemble) -> Floats:
    # T = 1 where none could be fitted: probabilities of raw margins.
    temperature = 1.0 if own.temperature is None else own.temperature.temperature
    return np.asarray(expit(scored.margins(ensemble.aggregator) / temperature))


def _subset_temperature(ensemble: RewardEnsemble, own: Row) -> Callable[[str], float | None]:
    calibration = ensemble.calibration
    if calibration is not None and calibration.aggregator == ensemble.aggregator:
        # Under a curve no single temperature describes a subset.
        if calibration.curve is not None:
            return lambda _: None
        return calibration.temperature_of
    fit = own.temperature
    return lambda _: None if fit is None else fit.temperature


def _pooling_gain(
    rows: Sequence[Row],
    own: Row,
    scored: ScoredPairs,
    ensemble: RewardEnsemble,
    draws: int,
    seed: int,
) -> Interval | None:
    fits = [row.temperature for row in rows if row.kind == "member"]
    members = [fit for fit in fits if fit is not None]
    # The gain is the difference of means over the same pairs, so every member must have a margin.
    whole = ~np.isnan(scored.member_margins).any(axis=1)
    if own.temperature is None or len(members) < len(fits) or not whole.any():
        return None
    margins = scored.margins(ensemble.aggregator)
    return measure_gain(scored, members, own.temperature, margins, draws=draws, seed=seed)


def _doubts(scored: ScoredPairs, p: Floats, ensemble: RewardEnsemble) -> dict[str, Floats]:
    # The entropy's order without its logarithm: certain pairs have |p − ½| near ½.
    doubts = {"entropy": -np.abs(p - 0.5)}
    if ensemble.calibration is not None:
        try:
            split = split_uncertainty(
                scored.member_margins,
                mixture_temperature=ensemble.calibration.mixture_temperature,
                nan="omit",
            )
        except OneMemberError:
            return doubts
        doubts["epistemic"] = unknown_as_most(split.epistemic)
    return doubts


def _correlation(scored: ScoredPairs) -> float | None:
    margins = scored.member_margins
    present = ~np.isnan(margins)
    # A pair of members without a common pair has no correlation, and no mean either.
    if not (present.T.astype(np.int64) @ present).all():
        return None  # two members scored no pair together
    return mean_correlation(margin_correlation(margins, nan="omit"))


def _length_auroc(test: Preferences) -> float | None:
    longer = np.array([len(pair.chosen) - len(pair.rejected) for pair in test], dtype=np.float64)
    y = test.targets
    # Ties have no longer winner to predict.
    decided = y != 0.5
    area = auroc(longer[decided], y[decided] > 0.5)
    return None if np.isnan(area) else area


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
    """Compute the metrics of one member or aggregator, before and after calibration.

    Parameters
    ----------
    name, kind : str
        As in `Row`.
    margins_of : callable
        Maps pairs to margins, shape (n_pairs,).
    scored : ScoredPairs
        The evaluated pairs.
    evidence : ScoredPairs, optional
        The calibration's judgments, which the row's temperature is fitted on.
    calibrated : ndarray, shape (n_pairs,), optional
        Probabilities after calibration (default: σ(Δ/T)).
    draws, seed : int
        Draws and seed of the bootstrap.
    """
    margins = margins_of(scored)
    present = ~np.isnan(margins)
    missing = int((~present).sum())
    if missing == len(margins):
        return Row(name, kind, {}, {}, None, None, None, f"{name} scored no pair", missing)
    if missing:  # a member counts on the pairs that it scored
        scored, margins = scored.take(np.flatnonzero(present)), margins[present]
    # T = 1: what the normalised scores say without any calibration.
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
                # Intervals show how few judgments there were; a refusal would hide the row.
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
    """Compute the metrics of each subset of the pairs, sorted by name."""
    subsets = np.array(scored.subsets, dtype=object)
    subset_rows = []
    for name in scored.subset_names:
        rows = np.flatnonzero(subsets == name)
        part = scored.take(rows)
        subset_rows.append(
            SubsetRow(
                name,
                len(part),
                len(np.unique(part.groups)),
                _measure(p[rows], part, draws, seed),
                ece_null(p[rows], seed=seed),
                temperature_of(name),
            )
        )
    return tuple(subset_rows)


def measure_gain(
    scored: ScoredPairs,
    members: list[TemperatureFit],
    pooled: TemperatureFit,
    margins: Floats,
    *,
    draws: int,
    seed: int,
) -> Interval:
    """Return the pooling gain: mean member NLL − pooled NLL in nats, each at its own held-out T.

    Only pairs that every member scored count.

    Parameters
    ----------
    scored : ScoredPairs
        The evaluated pairs.
    members : list of TemperatureFit
        One per member.
    pooled : TemperatureFit
        Of the aggregated margin.
    margins : ndarray, shape (n_pairs,)
        The aggregated margin.
    draws, seed : int
        Draws and seed of the bootstrap.
    """
    # Pairs that every member scored: means over different pairs could not be subtracted.
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
        # A ratio of sums per resample: the weights of the drawn prompts vary.
        lambda i: float((w[i] * values[i]).sum() / w[i].sum()),
        scored.groups,
        draws=draws,
        seed=seed,
    )


def _measure(p: Floats, scored: ScoredPairs, draws: int, seed: int) -> dict[str, Interval]:
    """Return every metric with its interval over prompts."""
    y = scored.targets
    per_pair = {"accuracy": agreement(p, y), "nll": pair_nll(p, y), "brier": (p - y) ** 2}
    metrics = {k: _mean_interval(v, scored, draws, seed) for k, v in per_pair.items()}
    for name, metric in (("ece", ece), ("smooth_ece", smooth_ece)):
        # The smooth ECE sorts for every bandwidth, which makes a resample slow.
        few = min(draws, 100) if name == "smooth_ece" else draws
        metrics[name] = bootstrap(
            lambda i, m=metric: m(p[i], y[i]),  # type: ignore[misc]
            scored.groups,
            draws=few,
            seed=seed,
        )
    return metrics
