"""Check the current version for the three kinds of drift, each against its own record.

Labelled: the version's sequential test, on judgments newer than those of its fit.
Unlabelled: scores of those judgments' pairs against the scores stored with the version.
Raters: verdicts on an anchor set that is judged repeatedly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_rm.calibration.calibration import Calibration, require_calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.drift.options import DriftCheckOptions
from ensemble_rm.drift.raters import RaterDrift, anchor_votes, rater_drift
from ensemble_rm.drift.reference import Reference, ScoredSet
from ensemble_rm.drift.report import DriftReport
from ensemble_rm.drift.state import (
    FOLDER,
    life_start,
    watch,
    write_state,
)
from ensemble_rm.drift.unlabelled import UnlabelledDrift, unlabelled_drift
from ensemble_rm.errors import DataError, NotCalibratedError
from ensemble_rm.evidence.dated_margins import DatedMargins, date_margins, load_members
from ensemble_rm.evidence.score_table import ScoreTable
from ensemble_rm.evidence.store_state import require_known_head
from ensemble_rm.evidence.window import Window, choose, read_window
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress, silent
from ensemble_rm.saved_json import reading
from ensemble_rm.versions.atomic_files import storage_errors
from ensemble_rm.versions.audit_log import AuditLog
from ensemble_rm.versions.job_run import check_clock, known_time
from ensemble_rm.versions.repository import Versions, describe_ensemble, now_utc
from ensemble_rm.versions.version import EVIDENCE, Version, read_evidence, version_folder

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

CHECKS = "looks.jsonl"  # written by the first release; still read from older run folders


def check_drift(
    folder: str | Path,
    store: JudgmentStore,
    *,
    options: DriftCheckOptions | None = None,
    load: Callable[..., RewardEnsemble] | None = None,
    clock: Callable[[], datetime] = now_utc,
    progress: Progress = silent,
) -> DriftReport:
    """Check for drift since the current version was published.

    Parameters
    ----------
    folder : str or Path
        An ensemble's versions.
    store : JudgmentStore
        Only read.
    options : DriftCheckOptions, optional
        Which judgments, tests, anchors. With `dry_run`, neither scores nor the state of the
        sequential test nor the report are kept.
    load, clock, progress : callable
        As in `recalibrate`.

    Returns
    -------
    DriftReport
        A kind that could not be tested is None, with its reason in `unavailable`.

    Raises
    ------
    NotCalibratedError
        If the current version has no calibration.
    LockedError, StorageError, StoreIntegrityError, ClockError
        As in `recalibrate`.
    """
    versions = Versions(folder, clock=clock)
    check = _Check(versions, store, options or DriftCheckOptions(), load, progress)
    with nullcontext() if check.options.dry_run else versions.lock(wait=check.options.wait):
        return check.run()


def past_checks(folder: str | Path) -> list[DriftReport]:
    """Return the reports of all checks that were kept.

    Parameters
    ----------
    folder : str or Path
        An ensemble's versions.

    Returns
    -------
    list of DriftReport
        Oldest first; without those of dry runs.
    """
    log = AuditLog(Path(folder).expanduser() / FOLDER, CHECKS)
    with reading(log.path):
        return [DriftReport.from_json(row) for row in log.read()]


@dataclass(frozen=True)
class _Check:
    versions: Versions
    store: JudgmentStore
    options: DriftCheckOptions
    load: Callable[..., RewardEnsemble] | None
    progress: Progress

    def run(self) -> DriftReport:
        folder, version = self.versions.folder, self.versions.incumbent()
        calibration = version.read_calibration()
        if calibration is None:
            raise NotCalibratedError(
                f"version {version.number} of {folder} has no calibration; recalibrate it first"
            )
        now = self.versions.clock()
        at = now.isoformat(timespec="seconds")
        with self.store.snapshot() as chain:
            require_known_head(
                self.versions.audit,
                chain,
                self.store.name,
                accept=self.options.accept_rewound_store,
            )
            check_clock(self.versions, self.options, self.store.newest())
            where, future = choose(self.store, self.options, latest=known_time(self.versions))
            window = read_window(self.store, where, future=future, progress=self.progress)
        table = ScoreTable(folder, version.members, read_only=self.options.dry_run)
        window, data = self._margins(version, calibration, window, table)
        state = watch(
            folder,
            version,
            calibration,
            data,
            inclusion=window.inclusion,
            options=self.options,
            at=at,
        )
        unavailable: dict[str, str] = {}
        unlabelled = raters = None
        try:
            unlabelled = _unlabelled(
                self.versions, version, calibration, window, table, self.options
            )
        except DataError as error:
            unavailable["unlabelled"] = str(error)
        try:
            raters = _raters(self.store, where, self.options)
        except DataError as error:
            unavailable["raters"] = str(error)
        report = DriftReport(at, state.result(), unlabelled, raters, unavailable)
        if not self.options.dry_run:
            write_state(folder, version, state)
            with storage_errors(f"writing the drift reports of {folder}"):
                AuditLog(folder / FOLDER, CHECKS).append(report.to_json())
        return report

    def _margins(
        self, version: Version, calibration: Calibration, window: Window, table: ScoreTable
    ) -> tuple[Window, DatedMargins]:
        ensemble = describe_ensemble(self.versions.ensemble_folder(version))
        require_calibration(calibration, ensemble.aggregator)
        return date_margins(
            window,
            self.store,
            table,
            calibration.aggregator,
            len(ensemble.normaliser.offset),
            lambda: load_members(self.versions, version, self.load),
            progress=self.progress,
        )


def _unlabelled(
    versions: Versions,
    version: Version,
    calibration: Calibration,
    window: Window,
    table: ScoreTable,
    options: DriftCheckOptions,
) -> UnlabelledDrift:
    from ensemble_rm.ensemble.results import Scores
    from ensemble_rm.members.scorer import Truncation

    evidence = _evidence(versions, version)
    if evidence is None:
        raise DataError(f"version {version.number} was stored without scores to compare with")
    # Judgments of the version's own fit are its reference, and cannot show a shift from it.
    fresh = window.times >= life_start(version, calibration) + 1
    members, groups, distance = _whole(*_sides(window, table, np.flatnonzero(fresh)))
    names = tuple(f"member {i}" for i in range(evidence.members))
    aggregator = calibration.aggregator

    def scores(members: Any) -> Scores:
        reward, cut = aggregator(members), Truncation.none(len(members))
        # Raw scores are not stored, and the test does not use them.
        return Scores(names, members, members, reward, cut)

    # Either side counts as a sample: (2·n_pairs, n_members).
    then = np.concatenate([evidence.first, evidence.second])
    labels = np.concatenate([evidence.groups, evidence.groups])
    far = evidence.distances.T.reshape(-1) if evidence.distances.size else None
    then, labels, far = _whole(then, labels, far)
    reference = Reference(names, ScoredSet.read(scores(then), labels, far))
    return unlabelled_drift(
        *(reference, scores(members), groups),
        distance=distance,
        alpha=options.alpha,
        checks=options.checks,
    )


def _whole(members: Any, groups: Any, distance: Any) -> tuple[Any, Any, Any]:
    """Leave out samples that a member did not score: statistics over members need all of them."""
    scored = np.isfinite(members).all(axis=1)
    return members[scored], groups[scored], None if distance is None else distance[scored]


def _evidence(versions: Versions, version: Version) -> ScoredPairs | None:
    path = versions.ensemble_folder(version)
    if version.kind == "calibration":
        path = version_folder(versions.folder, version.number)
    names = () if version.calibration is None else version.calibration.get("subset_names", ())
    return read_evidence(path / EVIDENCE, names)


def _sides(window: Window, table: ScoreTable, rows: Any) -> tuple[Any, Any, Any]:
    """Return the scores of both sides of each new pair, their prompts and distances.

    The distances are None if a pair has none: its ensemble has no feature space.
    """
    # A pair judged several times has one pair of scores.
    pairs, first = np.unique(window.pairs[rows], return_index=True)
    far = table.distances(window.keys[pairs])
    scores, prompts, distances = [], [], []
    for found, sides in table.blocks(window.keys[pairs]):
        scores.append(np.concatenate([sides[:, 0], sides[:, 1]]))
        prompt = window.groups[rows[first[found]]]
        prompts.append(np.concatenate([prompt, prompt]))
        # Transposed: all first sides, then all second ones, as the scores are concatenated.
        distances.append(far[found].T.reshape(-1))
    if not scores:
        raise DataError("no judgment is newer than the version's own, or none has stored scores")
    distance = np.concatenate(distances)
    complete = bool(np.isfinite(distance).all())
    return np.concatenate(scores), np.concatenate(prompts), distance if complete else None


def _raters(store: JudgmentStore, where: JudgmentFilter, options: DriftCheckOptions) -> RaterDrift:
    if not options.anchors:
        raise DataError("no anchor set is given; name its batches with `anchors` (--anchors)")
    # Without `since`: each anchor is compared with its first month.
    anchors = JudgmentFilter(until=where.until, batch=options.anchors)
    return rater_drift(
        anchor_votes(store.read(anchors)), alpha=options.alpha, checks=options.checks
    )
