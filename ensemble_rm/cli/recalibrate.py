"""``ensemble-rm recalibrate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.jobs import DAYS, TIME, Job
from ensemble_rm.cli.options import nested
from ensemble_rm.recalibration.options import RecalibrationOptions

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


@dataclass(frozen=True, kw_only=True)
class Recalibrate(Job):
    """Fit the published ensemble's temperature on fresh judgments, and publish it if it is better.

    RUN is a saved ensemble's folder; its first recalibration makes it version 1. Without a better
    fit the current version stays, and the reason is reported (exit codes 10 to 13). A second run on
    the same judgments publishes nothing. Every run is a line in RUN/audit.jsonl.
    """

    options: RecalibrationOptions = nested(
        RecalibrationOptions, panel="Job", half_life=DAYS, window=DAYS, since=TIME, until=TIME
    )

    example: ClassVar[str] = (
        "  ensemble-rm recalibrate runs/hh --judgments judgments.db --window 180d --half-life 60d"
    )

    def run(self, console: Console) -> int:
        """Run the job; return the verdict's exit code."""
        from ensemble_rm.recalibration.job import recalibrate

        with self.opened(console) as (store, progress):
            outcome = recalibrate(
                self.run_folder, store, options=self.options, load=self.load, progress=progress
            )
        return self.report(console, outcome, dry_run=self.options.dry_run)

    def next_command(self, verdict: str) -> str:
        """Return the command that follows a verdict."""
        run = self.run_folder
        return {
            "published": f"ensemble-rm versions list {run}",
            "kept": f"ensemble-rm drift {run} --judgments {self.judgments}",
            "too few": f"ensemble-rm select {run} --pool PAIRS.jsonl --budget 200",
            "drift alarm": f"ensemble-rm retrain {run} --data PAIRS.jsonl "
            f"--judgments {self.judgments}",
        }[verdict]
