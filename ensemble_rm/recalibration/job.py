"""The recalibration job: a run folder and a store of judgments → a new version, or a reason.

Idempotent and safe to kill: everything that it writes is written whole, under the folder's lock.
When it runs is left to cron or a scheduler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.calibration import Calibration, require_calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.drift.state import DriftOptions, summarise, watch, write_state
from ensemble_rm.evidence.dated_margins import DatedMargins
from ensemble_rm.evidence.pair_margins import evidence_of, load_members, window_margins
from ensemble_rm.evidence.score_table import ScoreTable
from ensemble_rm.evidence.window import Window, choose, read_window
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress, silent
from ensemble_rm.recalibration.decision import FLATTENED, Decision, GateOptions, decide
from ensemble_rm.recalibration.outcome import Recalibration, Verdict, explain, key_of
from ensemble_rm.versions.adopt import describe_ensemble
from ensemble_rm.versions.job_run import RunLog, working
from ensemble_rm.versions.repository import Versions, now_utc
from ensemble_rm.versions.version import Version

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

EVENT = "recalibrated"


def recalibrate(
    folder: str | Path,
    store: JudgmentStore,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    window: float | None = None,
    options: GateOptions | None = None,
    alarms: DriftOptions | None = DriftOptions(),  # noqa: B008
    dry_run: bool = False,
    wait: bool = False,
    load: Callable[..., RewardEnsemble] | None = None,
    clock: Callable[[], datetime] = now_utc,
    progress: Progress = silent,
) -> Recalibration:
    """Fit the current ensemble's temperature on fresh judgments; publish it if it is better.

    Parameters
    ----------
    folder : str or Path
        Of an ensemble or its versions; a plain ensemble becomes version 1.
    store : JudgmentStore
        Read only.
    since, until : datetime, optional
        Judged at or after the one, before the other.
    window : float, optional
        Days, counted back from the newest judgment; instead of `since`.
    options : GateOptions, optional
        Forgetting, gate, refusals.
    alarms : DriftOptions, optional
        Of the sequential test that watches the incumbent; None for no test.
    dry_run : bool
        Say everything, and write nothing.
    wait : bool
        For another job on the folder to end, instead of raising.
    load : callable, optional
        Takes the folder and `version`, returns the ensemble; called only for pairs without scores.
        `RewardEnsemble.from_pretrained` where not given.
    clock : callable
        Returns the time; for tests.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Recalibration
        The same judgments, members and options a second time are kept, and nothing is computed.

    Raises
    ------
    LockedError
        If another job works on the folder, and `wait` is not set.
    StorageError
        If something cannot be read or written; what was current still is.
    AggregatorMismatchError
        If the ensemble's calibration belongs to another aggregator than its reward.
    """
    versions = Versions(folder, clock=clock)
    log = RunLog(versions, EVENT, dry_run)
    bounds = {"since": since, "until": until, "days": window}
    job = _Job(versions, store, options or GateOptions(), alarms, bounds, log, load, progress)
    with working(log, wait=wait, prepare=job.mend_log):
        return job.run()


@dataclass(frozen=True)
class _Case:
    """What a run is about: the incumbent, its calibration, and what is known of the run so far."""

    incumbent: Version
    old: Calibration | None
    details: dict[str, Any]
    alarm: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Job:
    versions: Versions
    store: JudgmentStore
    options: GateOptions
    alarms: DriftOptions | None
    bounds: dict[str, Any]
    log: RunLog
    load: Callable[..., RewardEnsemble] | None
    progress: Progress

    def run(self) -> Recalibration:
        incumbent = self.versions.incumbent()
        said = describe_ensemble(self.versions.ensemble_folder(incumbent))
        aggregator = Aggregator.from_json(said["aggregator"])
        old = incumbent.read_calibration()
        if old is not None:
            require_calibration(old, aggregator)
        where, future = choose(self.store, latest=self._latest(incumbent), **self.bounds)
        window = read_window(self.store, where, future=future, progress=self.progress)
        options = self.options.to_json()
        key = key_of(window.digest, incumbent.members, said["aggregator"], options)
        details: dict[str, Any] = {
            "judgments": {"store": self.store.name} | window.describe(),
            "members": incumbent.members,
            "options": options,
            "key": key,
        }
        case = _Case(incumbent, old, details)
        known = self._known(incumbent, key)
        if known is not None:
            case.details["same_as"] = known[2]
            return self._end(case, known[0], known[1])
        table = ScoreTable(self.versions.folder, incumbent.members, read_only=self.log.dry_run)
        members = len(said["normaliser"]["offset"])
        loaded = partial(load_members, self.versions, incumbent, self.load)
        margins = window_margins(
            window, self.store, table, aggregator, members, loaded, progress=self.progress
        )
        window = window.rewarded(margins)
        case.details["judgments"] |= window.describe()
        data = window.with_margins(margins)
        case = replace(case, alarm=self._watch(case, data, window))
        now = self.versions.clock().isoformat(timespec="seconds")
        how: dict[str, Any] = {"options": self.options, "digest": window.digest, "created": now}
        decision = decide(data, aggregator, old, **how)
        case.details.update(explain(decision, old) | {"flat": decision.flat})
        return self._act(case, decision, lambda: evidence_of(window, table))

    def _watch(self, case: _Case, data: DatedMargins, window: Window) -> dict[str, Any] | None:
        if self.alarms is None or case.old is None:
            return None
        state = watch(
            self.versions.folder,
            case.incumbent,
            case.old,
            data,
            inclusion=window.inclusion,
            options=self.alarms,
            at=self.versions.clock().isoformat(timespec="seconds"),
        )
        if not self.log.dry_run:
            write_state(self.versions.folder, case.incumbent, state)
        return summarise(state)

    def _act(
        self, case: _Case, decision: Decision, evidence: Callable[[], ScoredPairs | None]
    ) -> Recalibration:
        if decision.answer != "publish" or decision.calibration is None:
            too_few = decision.answer == "too few"
            return self._end(case, "too few" if too_few else "kept", decision.reason)
        versioned = self.versions.versioned
        if versioned and self.versions.pointer.pinned:
            case.details["pinned"] = True
            number = case.incumbent.number
            return self._end(
                case, "kept", f"version {number} is pinned; unpinned: {decision.reason}"
            )
        number = self.versions.pointer.newest + 1 if versioned else 2
        if not self.log.dry_run:
            provenance = {"reason": decision.reason, "alarm": case.alarm} | case.details
            number = self.versions.publish_calibration(
                replace(decision.calibration, evidence=evidence()),
                provenance=provenance,
                run=self.log.run,
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
            at, way = case.alarm["alarmed_at"], case.alarm["direction"]
            reason = f"{way} since {at}, and nothing better to publish ({verdict}: {reason})"
            verdict = "drift alarm"
        if verdict == "published" and case.details["flat"]:
            verdict = "drift alarm"
        found = Recalibration(
            verdict,
            reason,
            self.log.run,
            case.incumbent.number,
            version,
            self.log.dry_run,
            None if case.old is None else case.old.temperature,
            after,
            case.alarm,
            case.details,
        )
        self.log.write(found.to_json())
        return found

    def _known(self, incumbent: Version, key: str) -> tuple[Verdict, str, str] | None:
        """Return the verdict, reason and run that found the same before; None where none did."""
        if incumbent.provenance.get("key") == key:
            run = incumbent.run
            reason = f"the same judgments, members and options as of {run}"
            if incumbent.provenance.get("flat"):
                return "drift alarm", reason + FLATTENED, run
            return "kept", reason, run
        last = self.versions.audit.last(event=EVENT)
        if last is None or last.get("verdict") == "error":
            return None
        details = last.get("details", {})
        if details.get("key") != key or details.get("pinned"):
            return None
        verdict: Verdict = "kept" if last["verdict"] == "published" else last["verdict"]
        run = str(details.get("same_as", last["run"]))
        first = f"the same judgments, members and options as of {run}"
        said = last["reason"] if "same_as" in details else f"{first}: {last['reason']}"
        return verdict, said, run

    def _latest(self, incumbent: Version) -> datetime:
        """Return the clock's time, or the last run's where the clock went back since."""
        times = [self.versions.clock(), datetime.fromisoformat(incumbent.created_at)]
        last = self.versions.audit.last(event=EVENT)
        if last is not None:
            times.append(datetime.fromisoformat(last["at"]))
        return max(time.astimezone(UTC) for time in times)

    def mend_log(self) -> None:
        """Write the line of a run that was killed between publishing and its line."""
        now = self.versions.current()
        if not now.run or self.versions.audit.last(event=EVENT, run=now.run) is not None:
            return
        details = dict(now.provenance)
        reason = str(details.pop("reason", ""))
        line: dict[str, Any] = {"event": EVENT, "at": now.created_at, "run": now.run}
        verdict = "drift alarm" if details.get("flat") else "published"
        line |= {"verdict": verdict, "reason": reason, "mended": True}
        line |= {"incumbent": now.parent, "version": now.number, "details": details}
        self.versions.audit.append(line)
