"""Judgments and an incumbent → a calibration to publish, or a reason to keep the incumbent.

Pure: arrays and options in, a decision out; the job and the benchmarks call the same function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.data.weights import effective_sample_size
from ensemble_rm.errors import CalibrationError, OptionError, TooFewJudgmentsError
from ensemble_rm.evidence.dated_margins import DAY, DatedMargins, forgetting
from ensemble_rm.recalibration.annotator_test import (
    AnnotatorReport,
    cap_weights,
    check_annotators,
)
from ensemble_rm.recalibration.fitting import (
    Fitted,
    fit_shrunk,
    require_enough,
    row_temperatures,
    shrunk_mixture,
)
from ensemble_rm.recalibration.gate import Gate, judge_candidate, losses
from ensemble_rm.recalibration.options import DecisionOptions
from ensemble_rm.recalibration.split import (
    Confirmation,
    TimeSplit,
    changed_since,
    compare_newest,
    split_by_time,
)

# Above this standard error of log T, the slope 1/T lies within two of its own errors of 0.
FLAT = 0.5
FLATTENED = (
    "; the judgments barely follow the margins, or contradict them, so that probabilities are "
    "flattened: recalibration cannot fix this, retrain the members"
)

Answer: TypeAlias = Literal["publish", "keep", "too few", "rejected"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision, with the fits and tests that it is based on.

    Attributes
    ----------
    answer : {"publish", "keep", "too few", "rejected"}
        ``"rejected"``: too large a share of the weight is of annotators whom the test rejects.
    reason : str
        Why, in words.
    calibration : Calibration, optional
        What to publish.
    gate : Gate, optional
        None where the gate was not reached.
    confirmation : Confirmation, optional
        None where it was not reached, or is switched off.
    candidate, final : Fitted, optional
        Fit of the older judgments, and of the whole window.
    changed : ndarray of bool, shape (n_judgments,), optional
        Judgments of the window that were left out because they contradict the newest.
    sizes : dict
        Numbers of judgments, effective judgments and prompts in window, fit and gate.
    annotators : AnnotatorReport, optional
        Whose weight was capped, and whose judgments were left out.
    kept : ndarray of bool, shape (n_judgments,), optional
        Judgments of annotators who were not rejected; `changed` refers to these.
    metrics : dict
        NLL before and after, on the gate part and (in sample) on the window.
    """

    answer: Answer
    reason: str
    calibration: Calibration | None = None
    gate: Gate | None = None
    confirmation: Confirmation | None = None
    candidate: Fitted | None = None
    final: Fitted | None = None
    changed: NDArray[np.bool_] | None = None
    annotators: AnnotatorReport | None = None
    kept: NDArray[np.bool_] | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def flat(self) -> bool:
        """Whether the calibration to publish is close to p = ½ everywhere."""
        return self.final is not None and self.final.own.log_se >= FLAT


def decide(
    data: DatedMargins,
    aggregator: Aggregator,
    incumbent: Calibration | None,
    *,
    options: DecisionOptions,
    digest: str = "",
    created: str = "",
) -> Decision:
    """Fit on the older judgments, gate on the newest, refit on all of them.

    Parameters
    ----------
    data : DatedMargins
        The window's judgments, with inclusion weights and without forgetting.
    aggregator : Aggregator
        Of the margins.
    incumbent : Calibration, optional
        The published one; without one, the candidate is compared with p = ½ (T = ∞).
    options : DecisionOptions
    digest, created : str
        Recorded in the calibration.

    Returns
    -------
    Decision

    Raises
    ------
    OptionError
        If the incumbent is not a temperature, or slices are requested and no judgment has a subset.
    """
    if incumbent is not None and incumbent.method != "temperature":
        raise OptionError(
            f"the incumbent was calibrated by {incumbent.method!r}; only temperatures are "
            "recalibrated: calibrate it with method='temperature' first"
        )
    half_life = None if options.half_life is None else options.half_life * DAY
    data = replace(data, weights=data.weights * forgetting(data.times, half_life=half_life))
    kept_rows, report = check_annotators(
        data,
        share=options.annotator_share,
        day_share=options.day_share,
        level=options.annotator_level,
    )
    results: dict[str, Any] = {"annotators": report, "kept": kept_rows}
    if report.rejected_share > options.max_rejected:
        reason = (
            f"{len(report.rejected)} of {report.annotators} annotators, with "
            f"{report.rejected_share:.0%} of the weight, judge unlike the others (at most "
            f"{options.max_rejected:.0%} may): {', '.join(report.rejected[:20])}; read their "
            "judgments, then leave out those that are wrong with --exclude-annotator"
        )
        return Decision(answer="rejected", reason=reason, **results)
    data = _capped(data.take(np.flatnonzero(kept_rows)), options)
    # Only T_mix needs the members' margins, at the end; without this every `take` would copy them.
    with_members, data = data, replace(data, member_margins=data.member_margins[:, :0])
    results["sizes"] = {"window": _size(data)}
    try:
        parts = split_by_time(data.groups, data.times, share=options.gate_share)
        results["sizes"]["left_out"] = parts.left_out
        decision = _gated(data, parts, incumbent, options, results)
    except TooFewJudgmentsError as error:
        return Decision(answer="too few", reason=str(error), **results)
    except CalibrationError as error:
        reason = f"no candidate can be fitted: {error}"
        return Decision(answer="keep", reason=reason, **results)
    if report.rejected:
        # Listed in every run that leaves them out: none comes back without a word.
        left_out = f"; left out, judging unlike the others: {', '.join(report.rejected[:20])}"
        if len(report.rejected) > 20:
            left_out += f" and {len(report.rejected) - 20} more"
        decision = replace(decision, reason=decision.reason + left_out)
    final = decision.final
    if final is None:
        return decision
    kept = with_members
    if decision.changed is not None:
        kept = with_members.take(np.flatnonzero(~decision.changed))
    mixture = shrunk_mixture(kept, incumbent, final.shrunk.share)
    calibration = Calibration(aggregator, final.fit, mixture, digest, created, slices=final.slices)
    return replace(decision, calibration=calibration)


def _gated(
    data: DatedMargins,
    parts: TimeSplit,
    incumbent: Calibration | None,
    options: DecisionOptions,
    results: dict[str, Any],
) -> Decision:
    """Decide everything but T_mix; fill `results` step by step, so that refusals report it."""
    # Capped again, because an annotator below the window's cap may have most of its newest part.
    # Not by day: the newest part is only a few days long.
    newest = cap_weights(data.take(parts.gate), share=options.annotator_share, day_share=1.0)
    fit, kept = parts.fit, data
    sizes = results["sizes"]
    sizes |= {"gate": _size(newest), "fit": _size(data.take(fit))}
    # Before the fit: without a gate, its candidate could not be published.
    if effective_sample_size(newest.weights) < options.min_judgments:
        raise TooFewJudgmentsError(
            f"the newest part has {len(newest)} judgments with an effective number of "
            f"{effective_sample_size(newest.weights):.0f}; the gate needs "
            f"{options.min_judgments}: collect more, or widen the window or the gate's share"
        )
    require_enough(data.take(fit), options.min_judgments, "older part")
    if options.confirm:
        confirmation = results["confirmation"] = compare_newest(data, fit, parts.gate)
        if not confirmation.agrees:
            return Decision(answer="keep", reason=f"unconfirmed: {confirmation.reason}", **results)
        changed = results["changed"] = changed_since(data, fit, len(parts.gate))
        fit, kept = fit[~changed[fit]], data.take(np.flatnonzero(~changed))
        sizes |= {"changed": int(changed.sum()), "fit": _size(data.take(fit))}
    candidate = fit_shrunk(
        data.take(fit),
        incumbent,
        slices=options.slices,
        minimum=options.min_judgments,
        part="older part",
    )
    results["candidate"] = candidate
    gate = results["gate"] = judge_candidate(
        losses(newest.margins, newest.targets, _temperatures(incumbent, newest)),
        losses(newest.margins, newest.targets, _fitted_temperatures(candidate, newest)),
        weights=newest.weights,
        groups=newest.groups,
        delta=options.delta,
        level=options.level,
    )
    results["metrics"] = {"gate_nll_before": gate.nll_before, "gate_nll_after": gate.nll_after}
    if not gate.passed:
        return Decision(answer="keep", reason=gate.reason, **results)
    final = results["final"] = fit_shrunk(
        kept, incumbent, slices=options.slices, minimum=options.min_judgments, part="window"
    )
    # In sample: for the record, not for the decision, which the gate has made.
    before = losses(kept.margins, kept.targets, _temperatures(incumbent, kept))
    after = losses(kept.margins, kept.targets, _fitted_temperatures(final, kept))
    total = float(kept.weights.sum())
    results["metrics"] |= {
        "window_nll_before": float((kept.weights * before).sum()) / total,
        "window_nll_after": float((kept.weights * after).sum()) / total,
    }
    decision = Decision(answer="publish", reason=gate.reason, **results)
    return replace(decision, reason=gate.reason + FLATTENED) if decision.flat else decision


def _capped(data: DatedMargins, options: DecisionOptions) -> DatedMargins:
    return cap_weights(data, share=options.annotator_share, day_share=options.day_share)


def _fitted_temperatures(fitted: Fitted, data: DatedMargins) -> Floats | float:
    return row_temperatures(fitted.fit.temperature, fitted.slices, data)


def _temperatures(incumbent: Calibration | None, data: DatedMargins) -> Floats | float:
    if incumbent is None:
        return math.inf
    return row_temperatures(incumbent.temperature, incumbent.slices, data)


def _size(data: DatedMargins) -> dict[str, Any]:
    return {
        "judgments": len(data),
        "effective": round(effective_sample_size(data.weights), 1),
        "prompts": data.prompts,
    }
