"""The retraining job: a run folder, its old pairs and a store → a new version, or a reason.

Idempotent and safe to kill: training goes on where it was, and a version is published whole, under
the folder's lock. When it runs is left to cron or a scheduler.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.data.samples import Preferences
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import TooFewJudgmentsError
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.members.backbone.checkpoint import DEFAULT_CACHE
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.progress import Progress, silent
from ensemble_rm.recalibration.outcome import Verdict, key_of
from ensemble_rm.retraining.candidate import Retraining, RetrainingOptions, deal, retrain
from ensemble_rm.versions.job_run import RunLog, working
from ensemble_rm.versions.repository import Versions, now_utc
from ensemble_rm.versions.version import Version

EVENT = "retrained"
WORK = ".retraining-"


@dataclass(frozen=True, slots=True)
class RetrainingRun:
    """The outcome of one run of the job.

    Attributes
    ----------
    verdict : {"published", "kept", "too few"}
    reason : str
        Why, in words.
    run : str
        Name of the run; the audit log and the version hold it.
    incumbent : int
        The version that was current.
    version : int, optional
        The one that was published.
    dry_run : bool
        Whether nothing was trained or written.
    details : dict
        Judgments, parts, gate, units, options.
    """

    verdict: Verdict
    reason: str
    run: str
    incumbent: int
    version: int | None
    dry_run: bool
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object: what `--json` prints and the audit log holds."""
        said: dict[str, Any] = finite_or_none(asdict(self))
        return said

    def __str__(self) -> str:
        """Say it in a line."""
        would = " (dry run: nothing was trained or written)" if self.dry_run else ""
        moved = "" if self.version is None else f" version {self.version}"
        return f"{self.verdict}{moved}: {self.reason}{would}"


def retrain_run(
    folder: str | Path,
    old: Preferences,
    store: JudgmentStore,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    reference: Preferences | None = None,
    recipe: Recipe | None = None,
    options: RetrainingOptions | None = None,
    dry_run: bool = False,
    wait: bool = False,
    load: Callable[[Path], RewardEnsemble] = RewardEnsemble.from_pretrained,
    cache_dir: str | Path | None = DEFAULT_CACHE,
    clock: Callable[[], datetime] = now_utc,
    progress: Progress = silent,
) -> RetrainingRun:
    """Retrain the current ensemble; publish it as a new version if the gate lets it.

    Parameters
    ----------
    folder : str or Path
        Of an ensemble or its versions; a plain ensemble becomes version 1. Rollback is
        `Versions.rollback`.
    old : Preferences
        What its members were trained on.
    store : JudgmentStore
        Read only.
    since, until : datetime, optional
        Judged at or after the one, before the other.
    reference, recipe, options
        As `retrain` takes them.
    dry_run : bool
        Deal the judgments and say so; train and write nothing.
    wait : bool
        For another job on the folder to end, instead of raising.
    load : callable
        Takes the folder, returns its current ensemble.
    cache_dir : str or Path, optional
        Of features and token states.
    clock : callable
        Returns the time; for tests.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RetrainingRun
        The same judgments, pairs, members and options a second time publish nothing.

    Raises
    ------
    LockedError
        If another job works on the folder, and `wait` is not set.
    StorageError
        If something cannot be read or written; what was current still is.
    OptionError, EmptyDataError, TrainingError
        As `retrain` does.
    """
    versions = Versions(folder, clock=clock)
    log = RunLog(versions, EVENT, dry_run)
    job = _Job(
        versions,
        old,
        store,
        JudgmentFilter(since=since, until=until),
        reference,
        recipe,
        options or RetrainingOptions(),
        log,
        load,
        cache_dir,
        progress,
    )
    with working(log, wait=wait):
        return job.run()


@dataclass(frozen=True)
class _Job:
    versions: Versions
    old: Preferences
    store: JudgmentStore
    where: JudgmentFilter
    reference: Preferences | None
    recipe: Recipe | None
    options: RetrainingOptions
    log: RunLog
    load: Callable[[Path], RewardEnsemble]
    cache_dir: str | Path | None
    progress: Progress

    def run(self) -> RetrainingRun:
        incumbent = self.versions.incumbent()
        told = self._told(incumbent)
        if (known := self._known(incumbent, told)) is not None:
            return self._end(incumbent, *known, told)
        if self.versions.versioned and self.versions.pointer.pinned:
            reason = f"version {incumbent.number} is pinned; unpin it, then retrain"
            return self._end(incumbent, "kept", reason, told | {"pinned": True})
        judgments = list(self.store.read(self.where))
        if self.log.dry_run:
            return self._end(incumbent, *self._dealt(judgments), told)
        work = self.versions.folder / f"{WORK}{told['inputs'][:16]}"
        found = retrain(
            self.load(self.versions.folder),
            self.old,
            judgments,
            reference=self.reference,
            recipe=self.recipe,
            options=self.options,
            out=work / "candidate",
            cache_dir=self.cache_dir,
            progress=self.progress,
        )
        ended = self._act(incumbent, found, told)
        self._remove_work()
        return ended

    def _dealt(self, judgments: list[Judgment]) -> tuple[Verdict, str]:
        try:
            parts = deal(judgments, self.old, self.options)
        except TooFewJudgmentsError as error:
            return "too few", str(error)
        shown = ", ".join(f"{count} {name}" for name, count in parts.judgments.items())
        return "kept", f"{shown}; and {len(self.old)} old pairs would be trained on"

    def _act(self, incumbent: Version, found: Retraining, told: dict[str, Any]) -> RetrainingRun:
        told = told | found.details | {"reason": found.reason}
        told["gate"] = None if found.gate is None else finite_or_none(asdict(found.gate))
        if found.answer != "publish" or found.ensemble is None:
            verdict: Verdict = "too few" if found.answer == "too few" else "kept"
            return self._end(incumbent, verdict, found.reason, told)
        published = self.versions.publish_ensemble(
            found.ensemble.save_pretrained,
            provenance={"retraining": finite_or_none(told) | {"run": self.log.run}},
        )
        return self._end(incumbent, "published", found.reason, told, version=published.number)

    def _end(
        self,
        incumbent: Version,
        verdict: Verdict,
        reason: str,
        told: dict[str, Any],
        *,
        version: int | None = None,
    ) -> RetrainingRun:
        found = RetrainingRun(
            verdict, reason, self.log.run, incumbent.number, version, self.log.dry_run, told
        )
        self.log.write(found.to_json())
        return found

    def _told(self, incumbent: Version) -> dict[str, Any]:
        fixed = self.old if self.reference is None else self.reference
        inputs: dict[str, Any] = {
            "judged": self.store.digest(self.where),
            "old": self.old.digest,
            "reference": fixed.digest,
            "recipe": None if self.recipe is None else asdict(self.recipe),
            "options": self.options.to_json(),
        }
        return inputs | {"inputs": key_of(inputs), "members": incumbent.members}

    def _known(self, incumbent: Version, told: dict[str, Any]) -> tuple[Verdict, str] | None:
        """Return the verdict and reason that the same inputs had; None where they are new."""
        members = incumbent
        if self.versions.versioned:  # below a calibration that came after
            members = self.versions.show(incumbent.ensemble)
        if members.provenance.get("retraining", {}).get("inputs") == told["inputs"]:
            return "kept", f"version {members.number} was trained on the same judgments and pairs"
        last = self.versions.audit.last(event=EVENT)
        if last is None or last.get("verdict") not in ("kept", "too few"):
            return None
        details = last.get("details", {})
        same = all(details.get(name) == told[name] for name in ("inputs", "members"))
        if not same or details.get("pinned"):
            return None
        return last["verdict"], f"the same inputs as before: {last['reason']}"

    def _remove_work(self) -> None:
        for place in self.versions.folder.glob(f"{WORK}*"):
            shutil.rmtree(place, ignore_errors=True)
