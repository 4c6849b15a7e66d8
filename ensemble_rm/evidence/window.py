"""The judgments of a window, streamed from the store into compact arrays; no text is held.

About 60 bytes a judgment. Knows the store; knows nothing of models, fits or versions.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.data.weights import inclusion_weights
from ensemble_rm.errors import OptionError
from ensemble_rm.evidence.dated_margins import DatedMargins, Ints
from ensemble_rm.evidence.score_table import KEY, Keys, PairMargins
from ensemble_rm.judgments.filter import JudgmentFilter, TimeRange
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress

AHEAD = timedelta(days=1)  # a judgment may be dated this much after the clock: time zones, skew
FIRST_NAMES = 8  # bytes of a prompt's name that tell it apart: one in 10⁷ clashes among a million


@dataclass(frozen=True, kw_only=True)
class WindowOptions(TimeRange):
    """Which judgments a job reads.

    Attributes
    ----------
    since, until : datetime, optional
        Judged at or after, and before; with time zones.
    window : float, optional
        Days, counted back from the newest judgment; instead of `since`.
    """

    window: float | None = field(
        default=None,
        metadata={"help": "days counted back from the newest judgment, instead of since"},
    )


@dataclass(frozen=True, eq=False)
class Window:
    """Judgments without texts and scores.

    Attributes
    ----------
    digest : str
        SHA-256 of the sorted ids, as `JudgmentStore.digest` gives it.
    keys : ndarray of S16, shape (n_pairs,)
        Names of the pairs, sorted, each once.
    pairs : ndarray of int32, shape (n_judgments,)
        Place of each judgment's pair in `keys`.
    targets, inclusion, weights : ndarray, shape (n_judgments,)
        Vote for the pair's own first side; π, 1 for random draws; 1/π within its batch.
    groups : ndarray of int, shape (n_judgments,)
        Name of the prompt.
    times : ndarray, shape (n_judgments,)
        Seconds since 1970.
    subsets : ndarray of int32, shape (n_judgments,)
        Place in `subset_names`; −1 where none is named.
    subset_names : tuple of str
        Sorted.
    where : JudgmentFilter
        What was asked of the store.
    future : int
        Judgments that were left out because they are dated after the clock.
    unscored : int
        Judgments that were left out because too few members scored a side of their pair.
    """

    digest: str
    keys: Keys
    pairs: NDArray[np.int32]
    targets: Floats
    inclusion: Floats
    weights: Floats
    groups: Ints
    times: Floats
    subsets: NDArray[np.int32]
    subset_names: tuple[str, ...]
    where: JudgmentFilter
    future: int
    unscored: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    def with_margins(self, found: PairMargins) -> DatedMargins:
        """Return the judgments with the margins of their pairs."""
        return DatedMargins(
            found.margins[self.pairs],
            found.members[self.pairs],
            self.targets,
            self.weights,
            self.groups,
            self.times,
            self.subsets,
            self.subset_names,
        )

    def rewarded(self, found: PairMargins) -> Window:
        """Return the judgments of the pairs that have a margin."""
        there = ~np.isnan(found.margins[self.pairs])
        if there.all():
            return self
        rows = ("pairs", "targets", "inclusion", "weights", "groups", "times", "subsets")
        kept = {name: getattr(self, name)[there] for name in rows}
        return replace(self, **kept, unscored=int((~there).sum()))

    def describe(self) -> dict[str, Any]:
        """Return what provenance says of the judgments."""
        said: dict[str, Any] = {"digest": self.digest, "count": len(self), "future": self.future}
        said["pairs"] = len(self.keys)
        if self.unscored:
            said["unscored"] = self.unscored
        if len(self):
            ends = (float(self.times.min()), float(self.times.max()))
            said |= dict(zip(("first", "last"), map(iso, ends), strict=True))
        return said


def iso(seconds: float) -> str:
    """Return a time as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def choose(
    store: JudgmentStore, options: WindowOptions, *, latest: datetime
) -> tuple[JudgmentFilter, int]:
    """Turn options into a filter, and count the judgments dated after the clock.

    A `window` is counted back from the newest judgment and not from the clock, so that the same
    judgments give the same window whenever the job runs.

    Parameters
    ----------
    store : JudgmentStore
    options : WindowOptions
    latest : datetime
        The clock's time, or a later one that is known to have passed.

    Returns
    -------
    where : JudgmentFilter
    future : int
        Judgments left out because they are dated after the clock; 0 where `until` is given.

    Raises
    ------
    OptionError
        If both `since` and `window` are given, or `window` is not > 0.
    """
    since, until, days = options.since, options.until, options.window
    if days is not None and since is not None:
        raise OptionError("since and window exclude each other; give one of them")
    if days is not None and not days > 0:
        raise OptionError(f"window must be > 0 days, not {days}")
    future = 0
    if until is None:
        horizon = latest + AHEAD
        future = store.count(JudgmentFilter(since=horizon))
        until = horizon if future else None
    if days is not None:
        newest = store.newest(JudgmentFilter(until=until))
        since = None if newest is None else newest - timedelta(days=days)
    return JudgmentFilter(since=since, until=until), future


def read_window(
    store: JudgmentStore, where: JudgmentFilter, *, future: int = 0, progress: Progress
) -> Window:
    """Stream the selected judgments into arrays.

    Parameters
    ----------
    store : JudgmentStore
    where : JudgmentFilter
    future : int
        What `choose` found.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Window
    """
    ids, pairs, prompts = bytearray(), bytearray(), bytearray()
    targets, inclusion, times = array("f"), array("d"), array("d")
    subsets, batches = array("i"), array("i")
    subset_of: dict[str | None, int] = {None: -1}
    batch_of: dict[str | None, int] = {}
    for one in store.observations(where):
        ids += one.id
        pairs += one.pair
        prompts += one.prompt[:FIRST_NAMES]
        targets.append(one.share)
        inclusion.append(1.0 if one.inclusion is None else one.inclusion)
        times.append(one.judged_at.timestamp())
        subsets.append(subset_of.setdefault(one.subset, len(subset_of) - 1))
        batches.append(batch_of.setdefault(one.batch, len(batch_of)))
        if len(targets) % 10_000 == 0:
            progress("reading judgments", len(targets), 0)
    keys, places = np.unique(np.frombuffer(bytes(pairs), f"S{KEY}"), return_inverse=True)
    chances = np.frombuffer(inclusion).copy()
    names = sorted(name for name in subset_of if name is not None)
    order = np.array([names.index(n) if n is not None else -1 for n in subset_of], np.int32)
    codes = np.frombuffer(subsets, np.int32)
    return Window(
        _digest(bytes(ids)),
        keys,
        places.astype(np.int32),
        np.frombuffer(targets, np.float32).astype(np.float64),
        chances,
        _weights(chances, np.frombuffer(batches, np.int32)),
        np.frombuffer(bytes(prompts), ">i8").astype(np.int64),
        np.frombuffer(times).copy(),
        order[codes + 1],
        tuple(names),
        where,
        future,
    )


def _weights(inclusion: Floats, batches: NDArray[np.int32]) -> Floats:
    return inclusion_weights(inclusion, batches).weights


def _digest(ids: bytes) -> str:
    found = hashlib.sha256()
    found.update(np.sort(np.frombuffer(ids, f"S{KEY}")).tobytes())
    return found.hexdigest()
