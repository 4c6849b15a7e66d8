"""Options of the drift tests, and of a check."""

from __future__ import annotations

from dataclasses import dataclass, field

from ensemble_rm.evidence.window import WindowOptions
from ensemble_rm.versions.options import RunOptions

TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class DriftOptions:
    """Options of the drift tests.

    Attributes
    ----------
    alpha : float
        Bound on the probability of any false alarm between one publication and the next, in (0, 1).
    tolerance : float
        Relative change of T that does not count as drift, ≥ 0.
    """

    alpha: float = field(
        default=0.05,
        metadata={"help": "bound on the probability of a false alarm over a version's life"},
    )
    tolerance: float = field(
        default=TOLERANCE, metadata={"help": "relative change of T that does not count as drift"}
    )


@dataclass(frozen=True, kw_only=True)
class DriftCheckOptions(WindowOptions, DriftOptions, RunOptions):
    """Options of `check_drift`.

    Attributes
    ----------
    checks : int
        Number of checks planned for one version. They share `alpha`, separately for the unlabelled
        tests and for the raters'; the labelled test may be repeated at will.
    anchors : tuple of str
        Batches of judgments of the anchor set; without any, raters are not tested.
    since, until, window, exclude_annotator, only_source
        Which judgments; see `WindowOptions`.
    alpha, tolerance
        See `DriftOptions`.
    dry_run, wait, accept_rewound_store, accept_clock, max_clock_lead
        See `RunOptions`.
    """

    checks: int = field(
        default=12, metadata={"help": "checks planned for one version, which share alpha"}
    )
    anchors: tuple[str, ...] = field(
        default=(), metadata={"help": "batch of judgments of the anchor set; repeatable"}
    )
