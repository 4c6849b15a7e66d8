"""What a run of the job says: its verdict, and all that it rests on, as JSON and in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.calibration.calibration import Calibration
from ensemble_rm.recalibration.decision import Decision

Verdict: TypeAlias = Literal["published", "kept", "too few", "drift alarm"]


@dataclass(frozen=True, slots=True)
class Recalibration:
    """The outcome of one run of `recalibrate`.

    Attributes
    ----------
    verdict : {"published", "kept", "too few", "drift alarm"}
        A drift alarm is one that no publication answered, or that was answered by a temperature so
        large that probabilities say next to nothing: the members have to be retrained.
    reason : str
        Why, in words.
    run : str
        Name of the run; the audit log and the version hold it.
    incumbent : int
        The version that was current; 1 of a plain ensemble.
    version : int, optional
        The one that was published, or that would be, in a dry run.
    dry_run : bool
        Whether nothing was written.
    temperature_before, temperature_after : float, optional
        Of the incumbent, and of what was published.
    alarm : dict, optional
        What the test of labelled drift found.
    details : dict
        Judgments, options, gate, confirmation, sizes, metrics, digests.
    """

    verdict: Verdict
    reason: str
    run: str
    incumbent: int
    version: int | None
    dry_run: bool
    temperature_before: float | None
    temperature_after: float | None
    alarm: Mapping[str, Any] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object: what `--json` prints and the audit log holds."""
        said: dict[str, Any] = finite_or_none(asdict(self))
        return said

    def __str__(self) -> str:
        """Say it in a line."""
        would = " (dry run: nothing was written)" if self.dry_run else ""
        moved = ""
        if self.version is not None:
            before = "none" if self.temperature_before is None else f"{self.temperature_before:.4f}"
            moved = f" version {self.version}, T {before} → {self.temperature_after:.4f}"
        return f"{self.verdict}{moved}: {self.reason}{would}"


def explain(decision: Decision, incumbent: Calibration | None) -> dict[str, Any]:
    """Return what a decision rests on, for provenance and the audit log."""
    said: dict[str, Any] = {"sizes": decision.sizes, "metrics": decision.metrics}
    said["gate"] = None if decision.gate is None else asdict(decision.gate)
    said["confirmation"] = None if decision.confirmation is None else asdict(decision.confirmation)
    for name in ("candidate", "final"):
        found = getattr(decision, name)
        if found is not None:
            said[name] = {
                "temperature": found.fit.temperature,
                "own": found.own.temperature,
                "own_log_se": found.own.log_se,
                "share": found.shrunk.share,
                "change": found.shrunk.change,
                "effective": found.effective,
            }
    said["incumbent_log_se"] = None if incumbent is None else incumbent.fit.log_se
    explained: dict[str, Any] = finite_or_none(said)
    return explained


def key_of(*parts: Any) -> str:
    """Return a digest of JSON values: equal runs have equal keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
