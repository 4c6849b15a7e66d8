"""Judgments and an incumbent → a calibration to publish, or the reason to keep what there is.

Pure: arrays and options in, a decision out; the job and the benchmarks run this same function.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.calibration.methods.temperature import MIN_JUDGMENTS
from ensemble_rm.data.weights import effective_sample_size
from ensemble_rm.errors import CalibrationError, OptionError, TooFewJudgmentsError
from ensemble_rm.evidence.dated_margins import (
    DAY,
    DatedMargins,
    forgetting,
)
from ensemble_rm.recalibration.confirmation import (
    Confirmation,
    changed_since,
    compare_newest,
)
from ensemble_rm.recalibration.fitting import (
    Fitted,
    fit_shrunk,
    require_enough,
    row_temperatures,
    shrunk_mixture,
)
from ensemble_rm.recalibration.gate import Gate, judge_candidate, losses
from ensemble_rm.recalibration.split import TimeSplit, split_by_time

FLAT = 0.5  # standard error of log T: the slope lies within two of its own above 0
FLATTENED = (
    "; the judgments hardly follow the margins or contradict them, so probabilities are flattened: "
    "no temperature mends that, retrain the members"
)

Answer: TypeAlias = Literal["publish", "keep", "too few"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GateOptions:
    """How a decision is taken.

    Attributes
    ----------
    half_life : float, optional
        Days after which a judgment counts half; where not given, all count alike.
    share : float
        Of the judgments, the newest, that are the gate's.
    delta : float
        Loss of NLL that has to be excluded, nats a judgment.
    level : float
        Of the gate's one-sided bound.
    min_judgments : int
        The fewest effective judgments to fit on, and to gate on.
    slices : bool
        Whether each subset gets a temperature of its own.
    confirm : bool
        Whether a sudden change waits for the next batch, and what was judged before it, or
        contradicts the newest otherwise, is left out; see `compare_newest`, `changed_since`.
    """

    half_life: float | None = None
    share: float = 1 / 6
    delta: float = 0.005
    level: float = 0.95
    min_judgments: int = MIN_JUDGMENTS
    slices: bool = False
    confirm: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return them by name."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """What is to be done, and all that it rests on.

    Attributes
    ----------
    answer : {"publish", "keep", "too few"}
    reason : str
        In words.
    calibration : Calibration, optional
        What is to be published.
    gate : Gate, optional
        Where it came to that.
    confirmation : Confirmation, optional
        Where it came to that.
    candidate, final : Fitted, optional
        Of the older judgments, and of the whole window.
    changed : ndarray of bool, shape (n_judgments,), optional
        Judgments of the window that were left out, because they contradict the newest.
    sizes : dict
        How many judgments, effective ones and prompts there are in window, fit and gate.
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
    sizes: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def flat(self) -> bool:
        """Whether what is to be published is nearly a coin: the judgments do not say otherwise."""
        return self.final is not None and self.final.own.log_se >= FLAT


def decide(
    data: DatedMargins,
    aggregator: Aggregator,
    incumbent: Calibration | None,
    *,
    options: GateOptions,
    digest: str = "",
    created: str = "",
) -> Decision:
    """Fit on the older judgments, gate on the newest, refit on all of them.

    Parameters
    ----------
    data : DatedMargins
        The window's judgments, with inclusion weights and without forgetting.
    aggregator : Aggregator
        Whose margins they are.
    incumbent : Calibration, optional
        What is published; where there is none, the candidate is compared with a coin (T = ∞).
    options : GateOptions
    digest, created : str
        What the calibration says of itself.

    Returns
    -------
    Decision

    Raises
    ------
    OptionError
        If the incumbent is no temperature, or slices are asked of judgments that name no subset.
    """
    if incumbent is not None and incumbent.method != "temperature":
        raise OptionError(
            f"the incumbent was calibrated by {incumbent.method!r}; only temperatures are "
            "recalibrated: calibrate it with method='temperature' first"
        )
    half_life = None if options.half_life is None else options.half_life * DAY
    data = replace(data, weights=data.weights * forgetting(data.times, half_life=half_life))
    members, data = data, replace(data, member_margins=data.member_margins[:, :0])
    sizes: dict[str, Any] = {"window": _size(data)}
    said: dict[str, Any] = {"sizes": sizes}
    try:
        parts = split_by_time(data.groups, data.times, share=options.share)
        sizes["left_out"] = parts.left_out
        found = _gated(data, parts, incumbent, options, said)
    except TooFewJudgmentsError as error:
        return Decision("too few", str(error), **said)
    except CalibrationError as error:
        return Decision("keep", f"no candidate can be fitted: {error}", **said)
    final = found.final
    if final is None:
        return found
    kept = members if found.changed is None else members.take(np.flatnonzero(~found.changed))
    mixture = shrunk_mixture(kept, incumbent, final.shrunk.share)
    calibration = Calibration(aggregator, final.fit, mixture, digest, created, slices=final.slices)
    return replace(found, calibration=calibration)


def _gated(
    data: DatedMargins,
    parts: TimeSplit,
    incumbent: Calibration | None,
    options: GateOptions,
    said: dict[str, Any],
) -> Decision:
    how: dict[str, Any] = {"slices": options.slices, "minimum": options.min_judgments}
    newest, fit, kept = data.take(parts.gate), parts.fit, data
    said["sizes"] |= {"gate": _size(newest), "fit": _size(data.take(fit))}
    if effective_sample_size(newest.weights) < options.min_judgments:
        raise TooFewJudgmentsError(
            f"the newest part has {len(newest)} judgments, which weigh as "
            f"{effective_sample_size(newest.weights):.0f}; a gate needs {options.min_judgments}: "
            "collect more, or widen the window or the gate's share"
        )
    require_enough(data.take(fit), options.min_judgments, "older part")
    if options.confirm:
        found = compare_newest(data, fit, parts.gate)
        said["confirmation"] = found
        if not found.agrees:
            return Decision("keep", f"unconfirmed: {found.reason}", **said)
        changed = changed_since(data, fit, len(parts.gate))
        fit, kept = fit[~changed[fit]], data.take(np.flatnonzero(~changed))
        said["sizes"] |= {"changed": int(changed.sum()), "fit": _size(data.take(fit))}
        said["changed"] = changed
    candidate = fit_shrunk(data.take(fit), incumbent, part="older part", **how)
    gate = _gate(newest, incumbent, candidate, options)
    said |= {"candidate": candidate, "gate": gate}
    said["metrics"] = {"gate_nll_before": gate.nll_before, "gate_nll_after": gate.nll_after}
    if not gate.passed:
        return Decision("keep", gate.reason, **said)
    final = fit_shrunk(kept, incumbent, part="window", **how)
    before = losses(kept.margins, kept.targets, _temperatures(incumbent, kept))
    after = losses(
        kept.margins, kept.targets, row_temperatures(final.fit.temperature, final.slices, kept)
    )
    total = float(kept.weights.sum())
    said["metrics"] |= {
        "window_nll_before": float((kept.weights * before).sum()) / total,
        "window_nll_after": float((kept.weights * after).sum()) / total,
    }
    ended = Decision("publish", gate.reason, final=final, **said)
    return replace(ended, reason=gate.reason + FLATTENED) if ended.flat else ended


def _gate(
    newest: DatedMargins, incumbent: Calibration | None, candidate: Fitted, options: GateOptions
) -> Gate:
    after = row_temperatures(candidate.fit.temperature, candidate.slices, newest)
    return judge_candidate(
        losses(newest.margins, newest.targets, _temperatures(incumbent, newest)),
        losses(newest.margins, newest.targets, after),
        weights=newest.weights,
        groups=newest.groups,
        delta=options.delta,
        level=options.level,
    )


def _temperatures(incumbent: Calibration | None, data: DatedMargins) -> Any:
    if incumbent is None:
        return math.inf
    return row_temperatures(incumbent.temperature, incumbent.slices, data)


def _size(data: DatedMargins) -> dict[str, Any]:
    return {
        "judgments": len(data),
        "effective": round(effective_sample_size(data.weights), 1),
        "prompts": data.prompts,
    }
