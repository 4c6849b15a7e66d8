"""The margins of a window's pairs: from stored scores, and by scoring the pairs that have none.

Texts are read only for pairs without scores, a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.aggregation.aggregator import Aggregator
from ensemble_rm.arrays import Floats
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.data.samples import Preference, Preferences
from ensemble_rm.errors import DataError, RemoteUnavailableError
from ensemble_rm.evidence.dated_margins import Ints
from ensemble_rm.evidence.score_table import KEY, Keys, PairMargins, ScoreTable, read_margins
from ensemble_rm.evidence.window import Window
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress
from ensemble_rm.versions.repository import Versions
from ensemble_rm.versions.version import Version

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

CHUNK = 2048  # pairs that are scored at once
EVIDENCE_LIMIT = 50_000  # judgments whose scores go with a version; their table holds them all


def window_margins(
    window: Window,
    store: JudgmentStore,
    table: ScoreTable,
    aggregator: Aggregator,
    members: int,
    load: Callable[[], RewardEnsemble],
    *,
    progress: Progress,
) -> PairMargins:
    """Return the margins of a window's pairs; score and keep those that are not stored.

    Parameters
    ----------
    window : Window
    store : JudgmentStore
        Where the texts are.
    table : ScoreTable
        Stored scores; a read-only one is not added to.
    aggregator : Aggregator
    members : int
        How many there are.
    load : callable
        Loads the ensemble; called only where something has to be scored.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    PairMargins
        Of the window's `keys`; NaN where too few members scored a side.

    Raises
    ------
    DataError
        If the texts of a pair are not in the store any more.
    """
    found = read_margins(table, window.keys, aggregator, members, progress=progress)
    unknown = ~found.stored
    if not unknown.any():
        return found
    ensemble, done = load(), 0
    # A member that failed, such as a server's, is tried again, now that the ensemble is loaded.
    failed = found.failed & found.stored
    for wanted in (unknown, failed):
        for chunk in _unscored(window, store, wanted):
            names = list(chunk)
            places = _places(window, names)
            try:
                sides, distances = _score(ensemble, list(chunk.values()))
            except RemoteUnavailableError:
                if wanted is unknown:
                    raise
                break  # what is stored suffices
            if wanted is failed:
                sides = _kept(table, window.keys[places], sides)
            found.fill(places, sides, aggregator)
            if not table.read_only:
                table.put(names, sides, distances)
            done += len(names)
            progress("scoring pairs", done, int((unknown | failed).sum()))
    if not found.stored.all():
        raise DataError(
            f"{int((~found.stored).sum())} pairs of the window have no texts in {store.name} any "
            "more; restore it from a copy"
        )
    return found


def _kept(table: ScoreTable, names: Keys, sides: Floats) -> Floats:
    """Return new scores, with the stored ones where a member failed only now."""
    order = np.argsort(names)
    kept = sides.copy()
    for places, old in table.blocks(names[order]):
        rows = order[places]
        kept[rows] = np.where(np.isnan(sides[rows]), old, sides[rows])
    return kept


def _unscored(
    window: Window, store: JudgmentStore, missing: NDArray[np.bool_]
) -> Iterator[dict[bytes, Judgment]]:
    left = {bytes(name) for name in _names(window, np.flatnonzero(missing))}
    chunk: dict[bytes, Judgment] = {}
    for one in store.read(window.where):
        if one.pair_digest in left:
            left.discard(one.pair_digest)
            chunk[one.pair_digest] = one
            if len(chunk) == CHUNK:
                yield chunk
                chunk = {}
    if chunk:
        yield chunk


def _names(window: Window, places: Ints) -> list[bytes]:
    raw = window.keys[places].tobytes()
    return [raw[i : i + KEY] for i in range(0, len(raw), KEY)]


def _places(window: Window, names: list[bytes]) -> Ints:
    return np.searchsorted(window.keys, np.frombuffer(b"".join(names), f"S{KEY}"))


def _score(
    ensemble: RewardEnsemble, judged: list[Judgment]
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Return (n_pairs, 2, n_members) normalised scores, the pair's own first side first.

    And the (n_pairs, 2) distances to the training features, where the ensemble knows those.
    """
    pairs = []
    for judgment in judged:
        _, first, second = judgment.text_digests
        sides = (judgment.first, judgment.second)
        pairs.append(Preference(judgment.prompt, *(sides if first <= second else sides[::-1])))
    scored = ensemble.judge(Preferences(tuple(pairs)))
    distances = scored.distances if scored.distances.shape[1] else None
    return np.stack([scored.first, scored.second], axis=1), distances


def evidence_of(window: Window, table: ScoreTable) -> ScoredPairs | None:
    """Return the window's judgments with both sides' scores; None where they are too many."""
    if len(window) > EVIDENCE_LIMIT:
        return None
    whole: NDArray[np.float64] | None = None
    for places, sides in table.blocks(window.keys):
        if whole is None:
            whole = np.zeros((len(window.keys), *sides.shape[1:]))
        whole[places] = sides
    if whole is None:
        return None
    far = table.distances(window.keys)[window.pairs]
    names = [None if code < 0 else window.subset_names[code] for code in window.subsets]
    return ScoredPairs(
        whole[window.pairs, 0],
        whole[window.pairs, 1],
        window.targets,
        window.weights,
        np.unique(window.groups, return_inverse=True)[1],
        tuple(names),
        distances=far if np.isfinite(far).all() else far[:, :0],
    )


def load_members(
    versions: Versions, version: Version, load: Callable[..., RewardEnsemble] | None
) -> RewardEnsemble:
    """Load the ensemble that a version's members lie in; by `from_pretrained` where not given."""
    if load is None:
        from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

        load = RewardEnsemble.from_pretrained
    if versions.versioned:
        return load(versions.folder, version=version.ensemble)
    return load(versions.folder)
