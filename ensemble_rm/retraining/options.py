"""Options of a retraining."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ensemble_rm.calibration.limits import MIN_JUDGMENTS
from ensemble_rm.errors import OptionError
from ensemble_rm.judgments.filter import JobSelection
from ensemble_rm.versions.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class RetrainingOptions:
    """How members are retrained and judged.

    Attributes
    ----------
    gate_share : float
        Share of the judgments on new prompts, the newest, that the gate uses.
    calibration_share : float
        Share of them that sets the temperatures.
    validation_share : float
        Share of the training pairs, by prompt, for early stopping; in (0, 1).
    weighted : bool
        Weight judgments by 1/π in training as well. Calibration and gate, which estimate quantities
        over all pairs, always do. Members learn what depends on the pair itself, and there the
        weights cost more than they gain (``benchmarks/lifecycle/selection.py``).
    delta : float
        Rise of the NLL that the gate must exclude, nats per judgment; > 0.
    delta_accuracy : float
        Fall of the accuracy that the gate must exclude; in (0, 1).
    level : float
        Confidence of the one-sided bounds, in [0.5, 1).
    min_judgments : int
        Fewest effective judgments to calibrate on, and to gate on.
    seed : int
        Of the splits and of training. Keep it from one retraining to the next, so that no incumbent
        was trained on what calibrates the next one.
    """

    gate_share: float = field(
        default=0.25,
        metadata={"help": "share of the judgments on new prompts, the newest, for the gate"},
    )
    calibration_share: float = field(
        default=0.25, metadata={"help": "share of those judgments that sets the temperatures"}
    )
    validation_share: float = field(
        default=0.15, metadata={"help": "share of the training pairs for early stopping"}
    )
    weighted: bool = field(
        default=False, metadata={"help": "weight selected pairs by 1/π in training as well"}
    )
    delta: float = field(
        default=0.02, metadata={"help": "rise of the NLL that the gate must exclude, in nats"}
    )
    delta_accuracy: float = field(
        default=0.05, metadata={"help": "fall of the accuracy that the gate must exclude"}
    )
    level: float = field(
        default=0.95, metadata={"help": "confidence of the gate's one-sided bounds"}
    )
    min_judgments: int = field(
        default=MIN_JUDGMENTS,
        metadata={"help": "fewest effective judgments to calibrate on, and to gate on"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the splits and of training"})

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise OptionError(f"validation_share must be in (0, 1), not {self.validation_share}")
        if not (self.delta > 0 and 0 < self.delta_accuracy < 1 and 0.5 <= self.level < 1):
            raise OptionError(
                f"delta={self.delta} must be > 0, delta_accuracy={self.delta_accuracy} in (0, 1) "
                f"and level={self.level} in [0.5, 1)"
            )

    def training_json(self) -> dict[str, Any]:
        """Return the options of this class by name, without those of a subclass."""
        return {option.name: getattr(self, option.name) for option in fields(RetrainingOptions)}


@dataclass(frozen=True, kw_only=True)
class RetrainingRunOptions(JobSelection, RetrainingOptions, RunOptions):
    """Options of `retrain_run`.

    Attributes
    ----------
    since, until, exclude_annotator, only_source
        Which judgments; see `JobSelection`.
    gate_share, calibration_share, validation_share, weighted
        How the judgments are used; see `RetrainingOptions`.
    delta, delta_accuracy, level, min_judgments
        Of the gate; see `RetrainingOptions`.
    seed
        See `RetrainingOptions`.
    dry_run, wait, accept_rewound_store, accept_clock, max_clock_lead
        See `RunOptions`. A dry run splits the judgments, reports the parts, and trains nothing.
    """
