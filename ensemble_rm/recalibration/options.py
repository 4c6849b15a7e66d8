"""Options of a recalibration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ensemble_rm.calibration.limits import MIN_JUDGMENTS
from ensemble_rm.drift.options import DriftOptions
from ensemble_rm.evidence.window import WindowOptions
from ensemble_rm.versions.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class DecisionOptions:
    """How a candidate calibration is fitted and judged.

    Attributes
    ----------
    half_life : float, optional
        Days after which a judgment has half its weight; None for equal weights.
    gate_share : float
        Share of the judgments, the newest ones, that the gate uses; in (0, 1).
    delta : float
        Rise of the NLL that the gate must exclude, nats per judgment; > 0.
    level : float
        Confidence of the gate's one-sided bound.
    min_judgments : int
        Fewest effective judgments to fit on, and to gate on.
    slices : bool
        Fit one temperature per subset as well.
    annotator_share, day_share : float
        Largest share of the weight of an annotator, and of the judgments that arrive on one day, in
        (0, 1]; 1 switches a cap off. See `recalibration.annotator_test`.
    trust_batch : tuple of int
        Numbers of appended batches, as in the store's chain, to which the cap by day does not
        apply.
    annotator_level : float
        Level over all annotators of the test that rejects one; 0 switches it off.
    max_rejected : float
        Share of the weight above which rejected annotators are an alarm and nothing is published.
    confirm : bool
        Require the next batch to confirm a sudden change, and leave out older judgments that
        contradict the newest; see `compare_newest` and `changed_since`.
    """

    half_life: float | None = field(
        default=None, metadata={"help": "days after which a judgment has half its weight"}
    )
    gate_share: float = field(
        default=1 / 6, metadata={"help": "share of the judgments, the newest, that the gate uses"}
    )
    delta: float = field(
        default=0.005, metadata={"help": "rise of the NLL that the gate must exclude, in nats"}
    )
    level: float = field(
        default=0.95, metadata={"help": "confidence of the gate's one-sided bound"}
    )
    min_judgments: int = field(
        default=MIN_JUDGMENTS,
        metadata={"help": "fewest effective judgments to fit on, and to gate on"},
    )
    slices: bool = field(default=False, metadata={"help": "fit one temperature per subset as well"})
    confirm: bool = field(
        default=True, metadata={"help": "wait for the next batch to confirm a sudden change"}
    )

    annotator_share: float = field(
        default=0.2, metadata={"help": "largest share of an annotator in a window's weight"}
    )
    day_share: float = field(
        default=0.2,
        metadata={"help": "largest share of one day's arrivals in a window's weight"},
    )
    trust_batch: tuple[int, ...] = field(
        default=(),
        metadata={"help": "number of an appended batch without a cap by day; repeatable"},
    )
    annotator_level: float = field(
        default=0.01,
        metadata={"help": "level, over all annotators, of the test that rejects one"},
    )
    max_rejected: float = field(
        default=0.25,
        metadata={"help": "share of rejected weight above which nothing is published"},
    )

    def decision_json(self) -> dict[str, Any]:
        """Return the options of this class by name, without those of a subclass."""
        return {option.name: getattr(self, option.name) for option in fields(DecisionOptions)}


@dataclass(frozen=True, kw_only=True)
class RecalibrationOptions(WindowOptions, DecisionOptions, DriftOptions, RunOptions):
    """Options of `recalibrate`.

    Attributes
    ----------
    watch : bool
        Run the sequential drift test on the incumbent.
    since, until, window, exclude_annotator, only_source
        Which judgments; see `WindowOptions`.
    half_life, gate_share, delta, level, min_judgments, slices, confirm
        How a candidate is fitted and judged; see `DecisionOptions`.
    annotator_share, day_share, trust_batch, annotator_level, max_rejected
        How a candidate is fitted and judged; see `DecisionOptions`.
    alpha, tolerance
        Of the drift test; see `DriftOptions`.
    dry_run, wait, accept_rewound_store, accept_clock, max_clock_lead
        See `RunOptions`.
    """

    watch: bool = field(
        default=True, metadata={"help": "test the published temperature for drift on every run"}
    )
