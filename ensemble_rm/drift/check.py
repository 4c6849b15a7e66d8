"""One look at the version that is current: the three kinds of drift, each against its own record.

Labelled: the sequential test of the version's life, by judgments that are newer than its own.
Unlabelled: scores of those judgments' pairs against the scores that were stored with the version.
Raters: verdicts on an anchor set that is judged again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.calibration.calibration import Calibration, require_calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.drift.anchors import anchor_votes
from ensemble_rm.drift.raters import RaterDrift, rater_drift
from ensemble_rm.drift.reference import Reference, ScoredSet
from ensemble_rm.drift.report import DriftReport
from ensemble_rm.drift.state import (
    FOLDER,
    DriftOptions,
    life_start,
    watch,
    write_state,
)
from ensemble_rm.drift.unlabelled import UnlabelledDrift, unlabelled_drift
from ensemble_rm.errors import DataError, NotCalibratedError
from ensemble_rm.evidence.pair_margins import load_members, window_margins
from ensemble_rm.evidence.score_table import PairMargins, ScoreTable
from ensemble_rm.evidence.window import Window, choose, read_window
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress, silent
from ensemble_rm.versions import locate as reading
from ensemble_rm.versions.adopt import describe_ensemble
from ensemble_rm.versions.atomic_files import storage_errors
from ensemble_rm.versions.audit_log import AuditLog
from ensemble_rm.versions.repository import Versions, now_utc
from ensemble_rm.versions.version import Version

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

LOOKS = "looks.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class LookOptions:
    """How a look is taken.

    Attributes
    ----------
    labelled : DriftOptions
        Of the sequential test.
    alpha : float
        P(any alarm in all looks at one version) where nothing changes; of the unlabelled tests, and
        of the raters', each.
    looks : int
        How often a version will be looked at.
    anchors : tuple of str
        Batches of judgments that are the anchor set; none, no test of raters.
    """

    labelled: DriftOptions = field(default_factory=DriftOptions)
    alpha: float = 0.05
    looks: int = 12
    anchors: tuple[str, ...] = ()


def look(
    folder: str | Path,
    store: JudgmentStore,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    window: float | None = None,
    options: LookOptions | None = None,
    dry_run: bool = False,
    wait: bool = False,
    load: Callable[..., RewardEnsemble] | None = None,
    clock: Callable[[], datetime] = now_utc,
    progress: Progress = silent,
) -> DriftReport:
    """Look for drift since the current version was published.

    Parameters
    ----------
    folder : str or Path
        Of an ensemble's versions.
    store : JudgmentStore
        Read only.
    since, until, window
        Which judgments; as of `recalibrate`.
    options : LookOptions, optional
        Tests, levels, anchors.
    dry_run : bool
        Keep neither scores nor the state of the sequential test nor the report.
    wait : bool
        For a job on the folder to end, instead of raising.
    load, clock, progress : callable
        As of `recalibrate`.

    Returns
    -------
    DriftReport
        A kind that cannot be looked at is absent, and its reason is said.

    Raises
    ------
    NotCalibratedError
        If the current version has no calibration.
    LockedError, StorageError
        As `recalibrate` does.
    """
    versions = Versions(folder, clock=clock)
    bounds = {"since": since, "until": until, "days": window}
    taken = _Look(versions, store, options or LookOptions(), dry_run, load, progress)
    with nullcontext() if dry_run else versions.lock(wait=wait):
        return taken.take(bounds)


@dataclass(frozen=True)
class _Look:
    versions: Versions
    store: JudgmentStore
    options: LookOptions
    dry_run: bool
    load: Callable[..., RewardEnsemble] | None
    progress: Progress

    def take(self, bounds: dict[str, Any]) -> DriftReport:
        folder, version = self.versions.folder, self.versions.incumbent()
        calibration = version.read_calibration()
        if calibration is None:
            raise NotCalibratedError(f"version {version.number} of {folder} has no calibration")
        latest = self.versions.clock()
        where, future = choose(self.store, latest=latest, **bounds)
        window = read_window(self.store, where, future=future, progress=self.progress)
        table = ScoreTable(folder, version.members, read_only=self.dry_run)
        at = latest.isoformat(timespec="seconds")
        margins = self._margins(version, calibration, window, table)
        window = window.rewarded(margins)
        data = window.with_margins(margins)
        state = watch(
            *(folder, version, calibration, data),
            inclusion=window.inclusion,
            options=self.options.labelled,
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
        if not self.dry_run:
            write_state(folder, version, state)
            with storage_errors(f"writing the looks of {folder}"):
                AuditLog(folder / FOLDER, LOOKS).append(report.to_json())
        return report

    def _margins(
        self, version: Version, calibration: Calibration, window: Window, table: ScoreTable
    ) -> PairMargins:
        said = describe_ensemble(self.versions.ensemble_folder(version))
        require_calibration(calibration, Aggregator.from_json(said["aggregator"]))
        members = len(said["normaliser"]["offset"])
        return window_margins(
            *(window, self.store, table, calibration.aggregator, members),
            lambda: load_members(self.versions, version, self.load),
            progress=self.progress,
        )


def past_looks(folder: str | Path) -> list[DriftReport]:
    """Return the reports of every look that was kept, oldest first."""
    log = AuditLog(Path(folder).expanduser() / FOLDER, LOOKS)
    return [DriftReport.from_json(said) for said in log.read()]


def _unlabelled(
    versions: Versions,
    version: Version,
    calibration: Calibration,
    window: Window,
    table: ScoreTable,
    options: LookOptions,
) -> UnlabelledDrift:
    from ensemble_rm.ensemble.results import Scores
    from ensemble_rm.members.encoding import Truncation

    evidence = _evidence(versions, version)
    if evidence is None:
        raise DataError(f"version {version.number} has no scores stored with it to compare with")
    fresh = window.times >= life_start(version, calibration) + 1
    members, groups, distance = _whole(*_sides(window, table, np.flatnonzero(fresh)))
    names = tuple(f"member {i}" for i in range(evidence.members))
    aggregator = calibration.aggregator

    def scores(members: Any) -> Scores:
        reward, cut = aggregator(members), Truncation.none(len(members))
        return Scores(names, members, members, reward, cut)

    then = np.concatenate([evidence.first, evidence.second])
    labels = np.concatenate([evidence.groups, evidence.groups])
    far = evidence.distances.T.reshape(-1) if evidence.distances.size else None
    then, labels, far = _whole(then, labels, far)
    reference = Reference(names, ScoredSet.read(scores(then), labels, far))
    return unlabelled_drift(
        *(reference, scores(members), groups),
        distance=distance,
        alpha=options.alpha,
        looks=options.looks,
    )


def _whole(members: Any, groups: Any, distance: Any) -> tuple[Any, Any, Any]:
    """Leave out samples that a member did not score: what compares members needs all of them."""
    there = np.isfinite(members).all(axis=1)
    return members[there], groups[there], None if distance is None else distance[there]


def _evidence(versions: Versions, version: Version) -> ScoredPairs | None:
    place = versions.ensemble_folder(version)
    if version.kind == "calibration":
        place = reading.version_folder(versions.folder, version.number)
    names = () if version.calibration is None else version.calibration.get("subset_names", ())
    return reading.read_evidence(place / reading.EVIDENCE, names)


def _sides(window: Window, table: ScoreTable, rows: Any) -> tuple[Any, Any, Any]:
    """Return the scores of both sides of each pair that is new, their prompts and distances.

    No distances where a pair has none: it was scored by an ensemble without a feature space.
    """
    pairs, first = np.unique(window.pairs[rows], return_index=True)
    far = table.distances(window.keys[pairs])
    apart = []
    parts, groups = [], []
    for places, sides in table.blocks(window.keys[pairs]):
        parts.append(np.concatenate([sides[:, 0], sides[:, 1]]))
        names = window.groups[rows[first[places]]]
        groups.append(np.concatenate([names, names]))
        apart.append(far[places].T.reshape(-1))
    if not parts:
        raise DataError("no judgment is newer than the version's own, or none has stored scores")
    distance = np.concatenate(apart)
    known = bool(np.isfinite(distance).all())
    return np.concatenate(parts), np.concatenate(groups), distance if known else None


def _raters(store: JudgmentStore, where: JudgmentFilter, options: LookOptions) -> RaterDrift:
    if not options.anchors:
        raise DataError("no anchor set is named; name its batches")
    chosen = JudgmentFilter(until=where.until, batch=options.anchors)
    return rater_drift(anchor_votes(store.read(chosen)), alpha=options.alpha, looks=options.looks)
