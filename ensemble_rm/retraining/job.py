"""The retraining job: a run folder, old pairs and a judgment store → a new version, or a reason.

Idempotent and safe to kill: training resumes where it stopped, and a version is published
atomically, under the folder's lock. Use cron or a workflow manager for scheduling.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.data.samples import Preferences
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.errors import TooFewJudgmentsError
from ensemble_rm.evidence.store_state import chain_json, require_known_head
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.members.learning.recipe import Recipe
from ensemble_rm.progress import Progress, silent
from ensemble_rm.retraining.candidate import (
    Retraining,
    retrain,
    sufficient_parts,
)
from ensemble_rm.retraining.options import RetrainingRunOptions
from ensemble_rm.versions.job_run import (
    Job,
    JobOutcome,
    Verdict,
    check_clock,
    digest_inputs,
)
from ensemble_rm.versions.repository import Versions, now_utc
from ensemble_rm.versions.version import Version

EVENT = "retrained"
WORK = ".retraining-"


@dataclass(frozen=True, kw_only=True)
class RetrainingRun(JobOutcome):
    """The outcome of one run of `retrain_run`.

    Attributes
    ----------
    verdict, reason, run, incumbent, version, dry_run, details
        As in every job; see `JobOutcome`.
    """


def retrain_run(
    folder: str | Path,
    old: Preferences,
    store: JudgmentStore,
    *,
    options: RetrainingRunOptions | None = None,
    reference: Preferences | None = None,
    recipe: Recipe | None = None,
    load: Callable[[Path], RewardEnsemble] = RewardEnsemble.from_pretrained,
    cache_dir: str | Path | None = DEFAULT_CACHE,
    clock: Callable[[], datetime] = now_utc,
    progress: Progress = silent,
) -> RetrainingRun:
    """Retrain the current ensemble; publish it as a new version if it passes the gate.

    Parameters
    ----------
    folder : str or Path
        A saved ensemble or its versions; a plain ensemble becomes version 1. `Versions.rollback`
        undoes a publication.
    old : Preferences
        The members' training pairs.
    store : JudgmentStore
        Only read.
    options : RetrainingRunOptions, optional
        Which judgments, split, gate, dry run.
    reference, recipe
        See `retrain`.
    load : callable
        Takes the folder, returns its current ensemble.
    cache_dir : str or Path, optional
        Folder of cached features and token states; None for no cache.
    clock : callable
        Returns the time; for tests.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    RetrainingRun
        A second run with the same judgments, pairs, members and options publishes nothing.

    Raises
    ------
    LockedError
        If another job works on the folder and `wait` is not set.
    StorageError
        If something cannot be read or written; the current version stays current.
    StoreIntegrityError, ClockError
        As in `recalibrate`.
    OptionError, DataError, TrainingError
        See `retrain`.
    """
    options = options or RetrainingRunOptions()
    job = _RetrainingJob(
        versions=Versions(folder, clock=clock),
        event=EVENT,
        options=options,
        progress=progress,
        old=old,
        store=store,
        where=options.filter(),
        reference=reference,
        recipe=recipe,
        load=load,
        cache_dir=cache_dir,
    )
    with job.holding_folder():
        return job.work()


@dataclass(frozen=True, kw_only=True)
class _RetrainingJob(Job):
    options: RetrainingRunOptions
    old: Preferences
    store: JudgmentStore
    where: JudgmentFilter
    reference: Preferences | None
    recipe: Recipe | None
    load: Callable[[Path], RewardEnsemble]
    cache_dir: str | Path | None

    def work(self) -> RetrainingRun:
        incumbent = self.versions.incumbent()
        with self.store.snapshot() as chain:
            accepted = require_known_head(
                self.versions.audit,
                chain,
                self.store.name,
                accept=self.options.accept_rewound_store,
            )
            clock = check_clock(self.versions, self.options, self.store.newest())
            details = self._inputs(incumbent)
            details["judgments"] = {"store": self.store.name, "chain": chain_json(chain)}
        if accepted:
            details["accepted_rewound_store"] = True
        if clock:
            details["clock"] = clock
        if (repeated := self._repeated(incumbent, details)) is not None:
            return self._end(incumbent, *repeated, details)
        # Before training, whose result could not be published.
        if self.versions.pinned:
            reason = f"version {incumbent.number} is pinned; unpin it, then retrain"
            return self._end(incumbent, "kept", reason, details | {"pinned": True})
        judgments = list(self.store.read(self.where))
        if self.options.dry_run:
            return self._end(incumbent, *self._planned(judgments), details)
        # Named by a digest of its inputs, so that a killed run resumes only its own training.
        scratch = self.versions.folder / f"{WORK}{details['inputs'][:16]}"
        result = retrain(
            self.load(self.versions.folder),
            self.old,
            judgments,
            reference=self.reference,
            recipe=self.recipe,
            options=self.options,
            out=scratch / "candidate",
            cache_dir=self.cache_dir,
            progress=self.progress,
        )
        outcome = self._act(incumbent, result, details)
        # Only after the outcome is logged: until then, a killed run can resume from them.
        for leftover in self.versions.folder.glob(f"{WORK}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return outcome

    def _planned(self, judgments: list[Judgment]) -> tuple[Verdict, str]:
        try:
            parts = sufficient_parts(judgments, self.old, self.options)
        except TooFewJudgmentsError as error:
            return "too few", str(error)
        counts = ", ".join(f"{count} {name}" for name, count in parts.judgments.items())
        return "kept", f"judgments: {counts}; training would also use {len(self.old)} old pairs"

    def _act(
        self, incumbent: Version, result: Retraining, details: dict[str, Any]
    ) -> RetrainingRun:
        details = details | result.details | {"reason": result.reason}
        details["gate"] = None if result.gate is None else finite_or_none(asdict(result.gate))
        if result.answer != "publish" or result.ensemble is None:
            verdict: Verdict = "too few" if result.answer == "too few" else "kept"
            return self._end(incumbent, verdict, result.reason, details)
        published = self.versions.publish_ensemble(
            result.ensemble.save_pretrained,
            provenance={"retraining": finite_or_none(details) | {"run": self.run}},
        )
        return self._end(incumbent, "published", result.reason, details, published.number)

    def _end(
        self,
        incumbent: Version,
        verdict: Verdict,
        reason: str,
        details: dict[str, Any],
        version: int | None = None,
    ) -> RetrainingRun:
        return self.finish(
            RetrainingRun(
                verdict=verdict,
                reason=reason,
                run=self.run,
                incumbent=incumbent.number,
                version=version,
                dry_run=self.options.dry_run,
                details=details,
            )
        )

    def _inputs(self, incumbent: Version) -> dict[str, Any]:
        reference = self.old if self.reference is None else self.reference
        inputs: dict[str, Any] = {
            "judged": self.store.digest(self.where),
            "old": self.old.digest,
            "reference": reference.digest,
            "recipe": None if self.recipe is None else asdict(self.recipe),
            "options": self.options.training_json(),
        }
        return inputs | {"inputs": digest_inputs(inputs), "members": incumbent.members}

    def _repeated(self, incumbent: Version, details: dict[str, Any]) -> tuple[Verdict, str] | None:
        """Return verdict and reason of an earlier run with the same inputs, if any."""
        trained = incumbent
        if self.versions.versioned:  # the incumbent may be a later calibration of these members
            trained = self.versions.show(incumbent.ensemble)
        if trained.provenance.get("retraining", {}).get("inputs") == details["inputs"]:
            return "kept", f"version {trained.number} was trained on the same judgments and pairs"
        last = self.last_run(inputs=details["inputs"], members=details["members"])
        # After a rollback, members that were published before may be published again.
        if last is None or last["verdict"] == "published":
            return None
        return last["verdict"], f"same inputs as the last run: {last['reason']}"
