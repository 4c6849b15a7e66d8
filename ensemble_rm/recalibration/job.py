"""The recalibration job: a run folder and a judgment store → a new version, or a reason why not.

Idempotent and safe to kill: every file is written atomically, under the folder's lock. Use cron or
a workflow manager for scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.calibration.calibration import Calibration, require_calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.drift.state import summarise, watch, write_state
from ensemble_rm.evidence.dated_margins import (
    DatedMargins,
    date_margins,
    evidence_of,
    load_members,
)
from ensemble_rm.evidence.score_table import ScoreTable
from ensemble_rm.evidence.store_state import chain_json, require_known_head
from ensemble_rm.evidence.window import Window, arrival_days, choose, read_window
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress, silent
from ensemble_rm.recalibration.decision import FLATTENED, Decision, decide
from ensemble_rm.recalibration.options import RecalibrationOptions
from ensemble_rm.versions.job_run import (
    Job,
    JobOutcome,
    Verdict,
    check_clock,
    digest_inputs,
    known_time,
)
from ensemble_rm.versions.repository import Versions, describe_ensemble, now_utc
from ensemble_rm.versions.version import Version

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

EVENT = "recalibrated"


@dataclass(frozen=True, kw_only=True)
class Recalibration(JobOutcome):
    """The outcome of one run of `recalibrate`.

    A drift alarm is an alarm without a better calibration to publish, a published temperature so
    large that probabilities carry almost no information, or annotators with a large share of the
    weight who judge unlike the others. In the first two cases the members need retraining; in the
    third a person has to read those annotators' judgments.

    Attributes
    ----------
    temperature_before, temperature_after : float, optional
        Of the incumbent and of the published calibration.
    alarm : dict, optional
        State of the labelled drift test.
    verdict, reason, run, incumbent, version, dry_run, details
        As in every job; see `JobOutcome`.
    """

    temperature_before: float | None = None
    temperature_after: float | None = None
    alarm: dict[str, Any] | None = None

    @property
    def change(self) -> str:
        """The temperature before and after."""
        before = "none" if self.temperature_before is None else f"{self.temperature_before:.4f}"
        return f", T {before} → {self.temperature_after:.4f}"


def recalibrate(
    folder: str | Path,
    store: JudgmentStore,
    *,
    options: RecalibrationOptions | None = None,
    load: Callable[..., RewardEnsemble] | None = None,
    clock: Callable[[], datetime] = now_utc,
    progress: Progress = silent,
) -> Recalibration:
    """Fit the current ensemble's temperature on fresh judgments; publish it if it is better.

    Parameters
    ----------
    folder : str or Path
        A saved ensemble or its versions; a plain ensemble becomes version 1.
    store : JudgmentStore
        Only read.
    options : RecalibrationOptions, optional
        Which judgments, forgetting, gate, drift test, dry run.
    load : callable, optional
        Takes the folder and `version`, returns the ensemble; called only for pairs without stored
        scores. Default: `RewardEnsemble.from_pretrained`.
    clock : callable
        Returns the time; for tests.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Recalibration
        A second run with the same judgments, members and options does no work, and its verdict is
        ``"kept"``.

    Raises
    ------
    LockedError
        If another job works on the folder and `wait` is not set.
    StorageError
        If something cannot be read or written; the current version stays current.
    AggregatorMismatchError
        If the ensemble's calibration belongs to another aggregator than its reward.
    StoreIntegrityError
        If the store lost or changed judgments, or lacks judgments that the last run read and
        `accept_rewound_store` is not set.
    ClockError
        If the clock is more than `max_clock_lead` days ahead and `accept_clock` is not set.
    """
    job = _RecalibrationJob(
        versions=Versions(folder, clock=clock),
        event=EVENT,
        options=options or RecalibrationOptions(),
        progress=progress,
        store=store,
        load=load,
    )
    with job.holding_folder():
        return job.work()


@dataclass(frozen=True)
class _Case:
    """The incumbent, its calibration, and the results of the run so far."""

    incumbent: Version
    calibration: Calibration | None
    details: dict[str, Any]
    alarm: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _RecalibrationJob(Job):
    options: RecalibrationOptions
    store: JudgmentStore
    load: Callable[..., RewardEnsemble] | None

    def work(self) -> Recalibration:
        incumbent = self.versions.incumbent()
        ensemble = describe_ensemble(self.versions.ensemble_folder(incumbent))
        aggregator = ensemble.aggregator
        calibration = incumbent.read_calibration()
        if calibration is not None:
            require_calibration(calibration, aggregator)
        with self.store.snapshot() as chain:
            accepted = require_known_head(
                self.versions.audit,
                chain,
                self.store.name,
                accept=self.options.accept_rewound_store,
            )
            clock = check_clock(self.versions, self.options, self.store.newest())
            where, future = choose(self.store, self.options, latest=known_time(self.versions))
            window = read_window(
                self.store,
                where,
                future=future,
                trusted=self.options.trust_batch,
                progress=self.progress,
            )
        options = self.options.decision_json()
        key = digest_inputs(window.digest, incumbent.members, ensemble.row["aggregator"], options)
        details: dict[str, Any] = {
            "judgments": {"store": self.store.name, "chain": chain_json(chain)} | window.describe(),
            "members": incumbent.members,
            "options": options,
            "key": key,
        }
        if accepted:
            details["accepted_rewound_store"] = True
        if clock:
            details["clock"] = clock
        case = _Case(incumbent, calibration, details)
        # Before any scoring, so that a repeated run costs only the reading of the window.
        if (repeated := self._repeated(incumbent, key)) is not None:
            verdict, reason, case.details["same_as"] = repeated
            return self._end(case, verdict, reason)
        table = ScoreTable(self.versions.folder, incumbent.members, read_only=self.options.dry_run)
        members = len(ensemble.normaliser.offset)
        loaded = partial(load_members, self.versions, incumbent, self.load)
        window, data = date_margins(
            window, self.store, table, aggregator, members, loaded, progress=self.progress
        )
        case.details["judgments"] |= window.describe()
        case = replace(case, alarm=self._watch(case, data, window))
        decision = decide(
            data,
            aggregator,
            calibration,
            options=self.options,
            digest=window.digest,
            created=self.versions.clock().isoformat(timespec="seconds"),
        )
        case.details.update(_explain(decision, calibration) | {"flat": decision.flat})
        if decision.annotators is not None and decision.annotators.capped_days:
            days = arrival_days(chain, self.options.trust_batch)
            capped = [k for k, day in days.items() if day in decision.annotators.capped_days]
            case.details["capped_batches"] = capped
            words = f"; batches {', '.join(map(str, capped[:20]))} of the store were reduced to "
            words += f"{self.options.day_share:.0%} of the weight a day (--trust-batch)"
            decision = replace(decision, reason=decision.reason + words)
        # Deferred: the evidence is read only if something is published.
        return self._act(case, decision, lambda: evidence_of(window, table))

    def _watch(self, case: _Case, data: DatedMargins, window: Window) -> dict[str, Any] | None:
        if not self.options.watch or case.calibration is None:
            return None
        state = watch(
            self.versions.folder,
            case.incumbent,
            case.calibration,
            data,
            inclusion=window.inclusion,
            options=self.options,
            at=self.versions.clock().isoformat(timespec="seconds"),
        )
        if not self.options.dry_run:
            write_state(self.versions.folder, case.incumbent, state)
        return summarise(state)

    def _act(
        self, case: _Case, decision: Decision, evidence: Callable[[], ScoredPairs | None]
    ) -> Recalibration:
        if decision.answer == "rejected":
            return self._end(case, "drift alarm", decision.reason)
        if decision.answer != "publish" or decision.calibration is None:
            too_few = decision.answer == "too few"
            return self._end(case, "too few" if too_few else "kept", decision.reason)
        if self.versions.pinned:
            case.details["pinned"] = True
            number = case.incumbent.number
            reason = f"version {number} is pinned; without the pin: {decision.reason}"
            return self._end(case, "kept", reason)
        # A dry run does not adopt a plain ensemble, which would be version 1.
        number = self.versions.pointer.newest + 1 if self.versions.versioned else 2
        if not self.options.dry_run:
            provenance = {"reason": decision.reason, "alarm": case.alarm} | case.details
            number = self.versions.publish_calibration(
                replace(decision.calibration, evidence=evidence()),
                provenance=provenance,
                run=self.run,
            ).number
        after = decision.calibration.temperature
        return self._end(case, "published", decision.reason, version=number, after=after)

    def _end(
        self,
        case: _Case,
        verdict: Verdict,
        reason: str,
        *,
        version: int | None = None,
        after: float | None = None,
    ) -> Recalibration:
        if case.alarm is not None and case.alarm["alarm"] and verdict != "published":
            at, direction = case.alarm["alarmed_at"], case.alarm["direction"]
            reason = f"{direction} since {at}, and nothing better to publish ({verdict}: {reason})"
            verdict = "drift alarm"
        # Published, but nearly p = ½ everywhere: somebody has to look at it.
        if verdict == "published" and case.details["flat"]:
            verdict = "drift alarm"
        old = case.calibration
        return self.finish(
            Recalibration(
                verdict=verdict,
                reason=reason,
                run=self.run,
                incumbent=case.incumbent.number,
                version=version,
                dry_run=self.options.dry_run,
                temperature_before=None if old is None else old.temperature,
                temperature_after=after,
                alarm=case.alarm,
                details=case.details,
            )
        )

    def _repeated(self, incumbent: Version, key: str) -> tuple[Verdict, str, str] | None:
        """Return verdict, reason and run of an earlier run with the same inputs, if any."""
        if incumbent.provenance.get("key") == key:
            run = incumbent.run
            reason = f"same judgments, members and options as run {run}"
            if incumbent.provenance.get("flat"):
                return "drift alarm", reason + FLATTENED, run
            return "kept", reason, run
        last = self.last_run(key=key)
        if last is None:
            return None
        # After a rollback the same inputs must not publish again: a person has rejected the result.
        verdict: Verdict = "kept" if last["verdict"] == "published" else last["verdict"]
        if "same_as" in last["details"]:
            return verdict, last["reason"], last["details"]["same_as"]
        run = last["run"]
        return verdict, f"same judgments, members and options as run {run}: {last['reason']}", run

    def repair_log(self) -> None:
        """Write the audit line of a run that was killed between its publication and the line."""
        current = self.versions.current()
        logged = (event.get("run") for event in self.versions.audit.read())
        if not current.run or current.run in logged:
            return
        details = dict(current.provenance)
        reason = str(details.pop("reason", ""))
        verdict = "drift alarm" if details.get("flat") else "published"
        line: dict[str, Any] = {"event": EVENT, "at": current.created_at, "run": current.run}
        line |= {"verdict": verdict, "reason": reason, "repaired": True}
        line |= {"incumbent": current.parent, "version": current.number, "details": details}
        self.versions.audit.append(line)


def _explain(decision: Decision, incumbent: Calibration | None) -> dict[str, Any]:
    """Return the figures behind a decision, for provenance and the audit log."""
    row: dict[str, Any] = {"sizes": decision.sizes, "metrics": decision.metrics}
    row["gate"] = None if decision.gate is None else asdict(decision.gate)
    row["annotators"] = None if decision.annotators is None else asdict(decision.annotators)
    row["confirmation"] = None if decision.confirmation is None else asdict(decision.confirmation)
    for name in ("candidate", "final"):
        fitted = getattr(decision, name)
        if fitted is not None:
            row[name] = {
                "temperature": fitted.fit.temperature,
                "own": fitted.own.temperature,
                "own_log_se": fitted.own.log_se,
                "share": fitted.shrunk.share,
                "change": fitted.shrunk.change,
                "effective": fitted.effective,
            }
    row["incumbent_log_se"] = None if incumbent is None else incumbent.fit.log_se
    explained: dict[str, Any] = finite_or_none(row)
    return explained
