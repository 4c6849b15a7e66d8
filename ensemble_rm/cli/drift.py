"""``ensemble-rm drift``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.jobs import CODES, DAYS, TIME, Job
from ensemble_rm.cli.options import nested, option
from ensemble_rm.drift.options import DriftCheckOptions

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


@dataclass(frozen=True, kw_only=True)
class Drift(Job):
    """Check the published ensemble for drift of labels, scores and raters.

    Three separate tests: whether the temperature still fits fresh judgments (a sequential test over
    the version's life), whether scores are distributed as at publication, and whether annotators
    still judge an anchor set as before. Exit code 12 if any of them alarms.
    """

    options: DriftCheckOptions = nested(
        DriftCheckOptions,
        panel="Check",
        window=DAYS,
        since=TIME,
        until=TIME,
        anchors={"metavar": "BATCH"},
    )
    plot: Path | None = option(
        "picture of all checks so far", default=None, metavar="PNG", flag="report"
    )

    example: ClassVar[str] = (
        "  ensemble-rm drift runs/hh --judgments judgments.db --anchors anchors \\\n"
        "      --report drift.png"
    )

    def run(self, console: Console) -> int:
        """Run the check; return 12 on an alarm."""
        from ensemble_rm.drift.check import check_drift, past_checks
        from ensemble_rm.drift.plots import draw_drift, drift_text

        with self.opened(console) as (store, progress):
            report = check_drift(
                self.run_folder, store, options=self.options, load=self.load, progress=progress
            )
        if self.plot is not None:
            past = past_checks(self.run_folder)
            draw_drift([*past, report] if self.options.dry_run else past, self.plot)
            console.save(self.plot, config=False)
        verdict = "drift alarm" if report.alarms else "kept"
        code = CODES[verdict] if report.alarms else 0
        data = report.to_json() | {"alarms": list(report.alarms), "exit_code": code}
        console.result(data, drift_text(report))
        console.next(self.next_command(verdict))
        return code

    def next_command(self, verdict: str) -> str:
        """Return the command that follows a check."""
        if verdict == "drift alarm":
            return f"ensemble-rm recalibrate {self.run_folder} --judgments {self.judgments}"
        return f"ensemble-rm versions list {self.run_folder}"
