"""Margins of dated judgments: the arrays, and how they are computed for a window.

Margins come from stored scores. Pairs without them are scored in chunks and stored; only their
texts are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.data.samples import Preference, Preferences
from ensemble_rm.errors import DataError, OptionError, RemoteUnavailableError, StorageError
from ensemble_rm.evidence.score_table import KEY, Keys, ScoreTable
from ensemble_rm.evidence.window import Ints, Window
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress
from ensemble_rm.versions.repository import Versions
from ensemble_rm.versions.version import Version

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

DAY = 86400.0
CHUNK = 2048  # pairs scored per chunk
EVIDENCE_LIMIT = 50_000  # bounds a version's size


# Arrays --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DatedMargins:
    """Judgments, one per row, with the margin of the judged pair.

    Attributes
    ----------
    margins : ndarray, shape (n_judgments,)
        Aggregated reward of the first side minus that of the second, in normalised units.
    member_margins : ndarray, shape (n_judgments, n_members)
        The same per member.
    targets : ndarray, shape (n_judgments,)
        1 where the first side was preferred, 0 where the second was, ½ for a tie.
    weights : ndarray, shape (n_judgments,)
        > 0.
    groups : ndarray of int, shape (n_judgments,)
        Digest of the prompt.
    times : ndarray, shape (n_judgments,)
        Time of the judgment, seconds since 1970.
    subsets : ndarray of int, shape (n_judgments,)
        Index into `subset_names`; −1 without a subset.
    subset_names : tuple of str
        Sorted.
    annotators, days : ndarray of int, shape (n_judgments,)
        Index into `annotator_names`, and day of arrival in the store; −1 where unknown (default).
    annotator_names : tuple of str
        Sorted.
    """

    margins: Floats
    member_margins: NDArray[Any]
    targets: Floats
    weights: Floats
    groups: Ints
    times: Floats
    subsets: NDArray[np.int32]
    subset_names: tuple[str, ...] = ()
    annotators: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    days: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    annotator_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.margins)
        for name in ("annotators", "days"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.full(n, -1, np.int64))
        for name in _COLUMNS:
            if len(getattr(self, name)) != n:
                raise OptionError(f"{len(getattr(self, name))} {name} for {n} margins")

    def __len__(self) -> int:
        return len(self.margins)

    def take(self, rows: NDArray[Any]) -> DatedMargins:
        """Return the judgments of some rows."""
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        names = {name: getattr(self, name) for name in _NAMES}
        return DatedMargins(**columns, **names)

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(np.unique(self.groups))


_NAMES = ("subset_names", "annotator_names")
_COLUMNS = tuple(column.name for column in fields(DatedMargins) if column.name not in _NAMES)


def join_margins(parts: Sequence[DatedMargins]) -> DatedMargins:
    """Concatenate judgments whose subsets and annotators have the same names."""
    values: dict[str, Any] = {name: getattr(parts[0], name) for name in _NAMES}
    for name in _COLUMNS:
        values[name] = np.concatenate([getattr(part, name) for part in parts])
    return DatedMargins(**values)


def forgetting(times: Floats, *, half_life: float | None) -> Floats:
    """Return 2^(−age/half_life), with the age counted from the newest judgment.

    The age does not depend on the clock, so that the same judgments always have the same weights.

    Parameters
    ----------
    times : ndarray, shape (n_judgments,)
        Seconds.
    half_life : float, optional
        Seconds, > 0; None for equal weights.

    Returns
    -------
    ndarray, shape (n_judgments,)

    Raises
    ------
    OptionError
        If `half_life` is not > 0.
    """
    if half_life is None or not len(times):
        return np.ones(len(times))
    if not half_life > 0:
        raise OptionError(f"half_life must be > 0, not {half_life}")
    # Bounded below, because exp2 underflows to 0 and weights must be > 0.
    return np.asarray(np.exp2(np.maximum((times - times.max()) / half_life, -500.0)))


# Scores to margins ---------------------------------------------------------------------------


@dataclass(eq=False)
class PairMargins:
    """Margins of pairs, as far as they are known.

    Attributes
    ----------
    margins : ndarray, shape (n_pairs,)
        Aggregated reward of the first side minus that of the second; NaN where unknown, or where
        too few members scored a side.
    members : ndarray of float32, shape (n_pairs, n_members)
        The same per member, in the precision that T_mix needs. NaN where a member failed and the
        aggregator leaves it out.
    stored : ndarray of bool, shape (n_pairs,)
        Whether the pair was scored at all.
    """

    margins: Floats
    members: NDArray[np.float32]
    stored: NDArray[np.bool_]

    @classmethod
    def unknown(cls, n: int, members: int) -> PairMargins:
        """Return `n` pairs without margins."""
        return cls(np.full(n, np.nan), np.zeros((n, members), np.float32), np.zeros(n, np.bool_))

    @property
    def failed(self) -> NDArray[np.bool_]:
        """Pairs without a score of every member; a failure, e.g. of a server, is retried."""
        return np.asarray(np.isnan(self.members).any(axis=1))

    def fill(self, rows: NDArray[Any], sides: Floats, aggregator: Aggregator) -> None:
        """Enter the margins of pairs from their scores, (n_rows, 2, n_members)."""
        first, second = (aggregator.where_enough(sides[:, i]) for i in (0, 1))
        self.margins[rows] = first - second
        self.stored[rows] = True
        self.members[rows] = sides[:, 0] - sides[:, 1]


def date_margins(
    window: Window,
    store: JudgmentStore,
    table: ScoreTable,
    aggregator: Aggregator,
    members: int,
    load: Callable[[], RewardEnsemble],
    *,
    progress: Progress,
) -> tuple[Window, DatedMargins]:
    """Return a window's judgments with their margins; score pairs that have no stored scores.

    Parameters
    ----------
    window : Window
    store : JudgmentStore
        Contains the texts.
    table : ScoreTable
        Stored scores; new ones are added unless it is read-only.
    aggregator : Aggregator
    members : int
        Number of members.
    load : callable
        Loads the ensemble; called only if something has to be scored.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    window : Window
        Without judgments on pairs of which too few members scored a side; `unscored` counts them.
    data : DatedMargins
        Its judgments.

    Raises
    ------
    DataError
        If a pair's texts are no longer in the store.
    StorageError
        If the table belongs to another number of members.
    """
    pairs = _read_stored(table, window.keys, aggregator, members, progress=progress)
    if not pairs.stored.all():
        _score_missing(pairs, window, store, table, aggregator, load(), progress)
    if not pairs.stored.all():
        raise DataError(
            f"{int((~pairs.stored).sum())} pairs of the window have no texts in {store.name} any "
            "more; restore it from a backup"
        )
    window = window.select(~np.isnan(pairs.margins[window.pairs]))
    data = DatedMargins(
        pairs.margins[window.pairs],
        pairs.members[window.pairs],
        window.targets,
        window.weights,
        window.groups,
        window.times,
        window.subsets,
        window.subset_names,
        window.annotators,
        window.days,
        window.annotator_names,
    )
    return window, data


def _read_stored(
    table: ScoreTable,
    keys: Keys,
    aggregator: Aggregator,
    members: int,
    *,
    progress: Progress,
) -> PairMargins:
    """Aggregate stored scores block by block, to bound memory."""
    pairs = PairMargins.unknown(len(keys), members)
    done = 0
    for rows, sides in table.blocks(keys):
        if sides.shape[2] != members:
            raise StorageError(
                f"{table.path} has scores of {sides.shape[2]} members, and the ensemble has "
                f"{members}; delete the file, and it is computed again"
            )
        pairs.fill(rows, sides, aggregator)
        done += len(rows)
        progress("reading scores", done, len(keys))
    return pairs


def _score_missing(
    pairs: PairMargins,
    window: Window,
    store: JudgmentStore,
    table: ScoreTable,
    aggregator: Aggregator,
    ensemble: RewardEnsemble,
    progress: Progress,
) -> None:
    unknown = ~pairs.stored
    # The ensemble is loaded now in any case, so members that failed earlier are retried.
    failed = pairs.failed & pairs.stored
    done, total = 0, int((unknown | failed).sum())
    # Unknown pairs first: without them there is no result, whereas retries are optional.
    for missing in (unknown, failed):
        for chunk in _unscored(window, store, missing):
            digests = list(chunk)
            rows = np.searchsorted(window.keys, np.frombuffer(b"".join(digests), f"S{KEY}"))
            try:
                sides, distances = _score(ensemble, list(chunk.values()))
            except RemoteUnavailableError:
                if missing is unknown:
                    raise
                break  # the stored scores of the other members suffice
            if missing is failed:
                sides = _keep_stored(table, window.keys[rows], sides)
            pairs.fill(rows, sides, aggregator)
            if not table.read_only:
                table.put(digests, sides, distances)
            done += len(digests)
            progress("scoring pairs", done, total)


def _keep_stored(table: ScoreTable, keys: Keys, sides: Floats) -> Floats:
    """Return new scores, with the stored one where a member failed only this time."""
    # `ScoreTable.blocks` takes sorted keys.
    order = np.argsort(keys)
    kept = sides.copy()
    for block, old in table.blocks(keys[order]):
        rows = order[block]
        kept[rows] = np.where(np.isnan(sides[rows]), old, sides[rows])
    return kept


def _unscored(
    window: Window, store: JudgmentStore, missing: NDArray[np.bool_]
) -> Iterator[dict[bytes, Judgment]]:
    """Yield one judgment, with texts, per pair without scores, in chunks by the pair's digest."""
    raw = window.keys[missing].tobytes()
    remaining = {raw[i : i + KEY] for i in range(0, len(raw), KEY)}
    chunk: dict[bytes, Judgment] = {}
    for judgment in store.read(window.where):
        pair = judgment.pair_digest
        if pair in remaining:
            remaining.discard(pair)
            chunk[pair] = judgment
            if len(chunk) == CHUNK:
                yield chunk
                chunk = {}
    if chunk:
        yield chunk


def _score(
    ensemble: RewardEnsemble, judgments: list[Judgment]
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return (n_pairs, 2, n_members) normalised scores, the side with the lower digest first.

    And the (n_pairs, 2) distances to the training features, if the ensemble has a feature space.
    """
    pairs = []
    for judgment in judgments:
        _, first, second = judgment.text_digests
        sides = (judgment.first, judgment.second)
        pairs.append(Preference(judgment.prompt, *(sides if first <= second else sides[::-1])))
    scored = ensemble.judge(Preferences(tuple(pairs)))
    distances = scored.distances if scored.distances.shape[1] else None
    return np.stack([scored.first, scored.second], axis=1), distances


def evidence_of(window: Window, table: ScoreTable) -> ScoredPairs | None:
    """Return the window's judgments with both sides' scores, to store with a version.

    None for more than `EVIDENCE_LIMIT` judgments, or if no scores are stored.
    """
    if len(window) > EVIDENCE_LIMIT:
        return None
    scores: NDArray[np.float64] | None = None
    for rows, sides in table.blocks(window.keys):
        if scores is None:
            scores = np.zeros((len(window.keys), *sides.shape[1:]))
        scores[rows] = sides
    if scores is None:
        return None
    distances = table.distances(window.keys)[window.pairs]
    names = [None if code < 0 else window.subset_names[code] for code in window.subsets]
    return ScoredPairs(
        scores[window.pairs, 0],
        scores[window.pairs, 1],
        window.targets,
        window.weights,
        np.unique(window.groups, return_inverse=True)[1],
        tuple(names),
        distances=distances if np.isfinite(distances).all() else distances[:, :0],
    )


def load_members(
    versions: Versions, version: Version, load: Callable[..., RewardEnsemble] | None
) -> RewardEnsemble:
    """Load the ensemble of a version's members; by default with `from_pretrained`."""
    if load is None:
        from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

        load = RewardEnsemble.from_pretrained
    if versions.versioned:
        return load(versions.folder, version=version.ensemble)
    return load(versions.folder)
