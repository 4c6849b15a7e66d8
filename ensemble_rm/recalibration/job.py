"""The recalibration job: a run folder and a store of judgments → a new version, or a reason.

Idempotent and safe to kill: everything that it writes is written whole, under the folder's lock.
When it runs is left to cron or a scheduler.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.calibration import Calibration, require_calibration
from ensemble_rm.errors import EnsembleRMError
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress, silent
from ensemble_rm.recalibration.decision import Decision, GateOptions, decide
from ensemble_rm.recalibration.outcome import Recalibration, Verdict, explain, key_of
from ensemble_rm.recalibration.pairs import evidence_of, window_margins
from ensemble_rm.recalibration.scores import ScoreTable
from ensemble_rm.recalibration.window import Window, choose, read_window
from ensemble_rm.versions.adoption import describe_ensemble
from ensemble_rm.versions.repository import Versions, now_utc
from ensemble_rm.versions.version import Version

if TYPE_CHECKING:
    from ensemble_rm.ensemble import RewardEnsemble

EVENT = "recalibrated"


def recalibrate(
    folder: str | Path,
    store: JudgmentStore,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    window: float | None = None,
    options: GateOptions | None = None,
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
    job = _Job(
        Versions(folder, clock=clock),
        store,
        options or GateOptions(),
        {"since": since, "until": until, "days": window},
        dry_run,
        load,
        progress,
        uuid.uuid4().hex[:16],
    )
    with nullcontext() if dry_run else job.versions.lock(wait=wait):
        try:
            if not dry_run:
                job.versions.adopt()
                job.versions.clean()
                job.mend_log()
            return job.run()
        except (EnsembleRMError, OSError) as error:
            if not dry_run:
                with suppress(OSError):
                    job.log({"verdict": "error", "reason": f"{type(error).__name__}: {error}"})
            raise


@dataclass(frozen=True)
class _Job:
    versions: Versions
    store: JudgmentStore
    options: GateOptions
    bounds: dict[str, Any]
    dry_run: bool
    load: Callable[..., RewardEnsemble] | None
    progress: Progress
    name: str

    def run(self) -> Recalibration:
        incumbent = self.versions.incumbent()
        said = describe_ensemble(self.versions.ensemble_folder(incumbent))
        aggregator = Aggregator.from_json(said["aggregator"])
        old = incumbent.read_calibration()
        if old is not None:
            require_calibration(old, aggregator)
        where, future = choose(self.store, latest=self._latest(incumbent), **self.bounds)
        window = read_window(self.store, where, future=future, progress=self.progress)
        details: dict[str, Any] = {
            "judgments": {"store": self.store.name} | window.describe(),
            "members": incumbent.members,
            "options": self.options.to_json(),
        }
        key = key_of(window.digest, incumbent.members, said["aggregator"], self.options.to_json())
        details["key"] = key
        known = self._known(incumbent, key)
        if known is not None:
            return self._end(incumbent, old, known[0], known[1], details | {"same_as": known[2]})
        table = ScoreTable(self.versions.folder, incumbent.members, read_only=self.dry_run)
        margins = window_margins(
            window,
            self.store,
            table,
            aggregator,
            len(said["normaliser"]["offset"]),
            lambda: self._load(incumbent),
            progress=self.progress,
        )
        decision = decide(
            window.with_margins(margins),
            aggregator,
            old,
            options=self.options,
            digest=window.digest,
            created=self.versions.clock().isoformat(timespec="seconds"),
        )
        return self._act(incumbent, old, decision, window, table, details)

    def _act(
        self,
        incumbent: Version,
        old: Calibration | None,
        decision: Decision,
        window: Window,
        table: ScoreTable,
        details: dict[str, Any],
    ) -> Recalibration:
        details = details | explain(decision, old)
        if decision.answer != "publish" or decision.calibration is None:
            verdict: Verdict = "too few" if decision.answer == "too few" else "kept"
            return self._end(incumbent, old, verdict, decision.reason, details)
        if self.versions.versioned and self.versions.pointer.pinned:
            reason = f"version {incumbent.number} is pinned; unpinned: {decision.reason}"
            return self._end(incumbent, old, "kept", reason, details | {"pinned": True})
        number = self.versions.pointer.newest + 1 if self.versions.versioned else 2
        after = decision.calibration.temperature
        if not self.dry_run:
            calibration = replace(decision.calibration, evidence=evidence_of(window, table))
            provenance = {"reason": decision.reason} | details
            number = self.versions.publish_calibration(
                calibration, provenance=provenance, run=self.name
            ).number
        return self._end(
            incumbent, old, "published", decision.reason, details, version=number, after=after
        )

    def _end(
        self,
        incumbent: Version,
        old: Calibration | None,
        verdict: Verdict,
        reason: str,
        details: dict[str, Any],
        *,
        version: int | None = None,
        after: float | None = None,
    ) -> Recalibration:
        found = Recalibration(
            verdict,
            reason,
            self.name,
            incumbent.number,
            version,
            self.dry_run,
            None if old is None else old.temperature,
            after,
            None,
            details,
        )
        if not self.dry_run:
            self.log(found.to_json())
        return found

    def _known(self, incumbent: Version, key: str) -> tuple[Verdict, str, str] | None:
        """Return the verdict, reason and run that found the same before; None where none did."""
        if incumbent.provenance.get("key") == key:
            run = incumbent.run
            return "kept", f"the same judgments, members and options as of {run}", run
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

    def _load(self, incumbent: Version) -> RewardEnsemble:
        load = self.load
        if load is None:
            from ensemble_rm.ensemble import RewardEnsemble

            load = RewardEnsemble.from_pretrained
        if self.versions.versioned:
            return load(self.versions.folder, version=incumbent.ensemble)
        return load(self.versions.folder)

    def _latest(self, incumbent: Version) -> datetime:
        """Return the clock's time, or the last run's where the clock went back since."""
        times = [self.versions.clock(), datetime.fromisoformat(incumbent.created_at)]
        last = self.versions.audit.last(event=EVENT)
        if last is not None:
            times.append(datetime.fromisoformat(last["at"]))
        return max(time.astimezone(UTC) for time in times)

    def log(self, said: dict[str, Any]) -> None:
        """Write the run's line."""
        line = {"event": EVENT, "at": self.versions.clock().isoformat(timespec="seconds")}
        self.versions.audit.append(line | {"run": self.name} | said)

    def mend_log(self) -> None:
        """Write the line of a run that was killed between publishing and its line."""
        now = self.versions.current()
        if not now.run or self.versions.audit.last(event=EVENT, run=now.run) is not None:
            return
        details = dict(now.provenance)
        reason = str(details.pop("reason", ""))
        line: dict[str, Any] = {"event": EVENT, "at": now.created_at, "run": now.run}
        line |= {"verdict": "published", "reason": reason, "mended": True}
        line |= {"incumbent": now.parent, "version": now.number, "details": details}
        self.versions.audit.append(line)
