"""The judgments of a time window, streamed from the store into arrays, without texts.

About 60 bytes per judgment. Knows nothing of models, fits or versions.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.arrays import Floats
from ensemble_rm.data.weights import inclusion_weights
from ensemble_rm.errors import OptionError
from ensemble_rm.evidence.score_table import KEY, Keys
from ensemble_rm.judgments.filter import JobSelection, JudgmentFilter
from ensemble_rm.judgments.store import JudgmentStore
from ensemble_rm.progress import Progress

if TYPE_CHECKING:
    from ensemble_rm.judgments.database.chain import Chain

AHEAD = timedelta(days=1)  # tolerated lead over the clock: time zones, skew
PROMPT_BYTES = 8  # of a prompt's digest; among a million prompts, P(any clash) is below 10⁻⁷

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class WindowOptions(JobSelection):
    """Which judgments a job reads.

    Attributes
    ----------
    since, until : datetime, optional
        Judged at or after, and before; with time zones.
    window : float, optional
        Days, counted back from the newest judgment; instead of `since`.
    exclude_annotator, only_source
        See `JobSelection`.
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
        SHA-256 of the sorted ids, equal to `JudgmentStore.digest`.
    keys : ndarray of S16, shape (n_pairs,)
        Digests of the pairs, sorted, each once.
    pairs : ndarray of int32, shape (n_judgments,)
        Index of each judgment's pair in `keys`.
    targets, inclusion, weights : ndarray, shape (n_judgments,)
        Vote for the pair's side with the lower digest; π, 1 for random draws; 1/π within its batch.
    groups : ndarray of int, shape (n_judgments,)
        Digest of the prompt.
    times : ndarray, shape (n_judgments,)
        Seconds since 1970.
    subsets : ndarray of int32, shape (n_judgments,)
        Index into `subset_names`; −1 without a subset.
    subset_names : tuple of str
        Sorted.
    where : JudgmentFilter
        The selection.
    annotators, days : ndarray of int, shape (n_judgments,)
        Index into `annotator_names`; day of arrival, see `arrival_days`.
    annotator_names : tuple of str
        Sorted.
    future : int
        Judgments left out because they are dated after the clock.
    unscored : int
        Judgments left out because too few members scored a side of their pair.
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
    annotators: Ints
    days: Ints
    annotator_names: tuple[str, ...]
    unscored: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, scored: NDArray[np.bool_]) -> Window:
        """Return the window without judgments on pairs that could not be scored."""
        if scored.all():
            return self
        columns = (
            *("pairs", "targets", "inclusion", "weights", "groups", "times", "subsets"),
            *("annotators", "days"),
        )
        kept = {name: getattr(self, name)[scored] for name in columns}
        return replace(self, **kept, unscored=int((~scored).sum()))

    def describe(self) -> dict[str, Any]:
        """Return digest, counts and dates of the judgments, for provenance."""
        row: dict[str, Any] = {"digest": self.digest, "count": len(self), "future": self.future}
        row["pairs"] = len(self.keys)
        if self.unscored:
            row["unscored"] = self.unscored
        if len(self):
            row |= {"first": iso(self.times.min()), "last": iso(self.times.max())}
        return row


def iso(seconds: float) -> str:
    """Return a time as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def choose(
    store: JudgmentStore, options: WindowOptions, *, latest: datetime
) -> tuple[JudgmentFilter, int]:
    """Turn options into a filter, and count the judgments dated after the clock.

    A `window` is counted back from the newest judgment, not from the clock, so that the same
    judgments always give the same window.

    Parameters
    ----------
    store : JudgmentStore
    options : WindowOptions
    latest : datetime
        The clock's time, or that of the last run if the clock was set back.

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
    selected = replace(options.filter(), since=None, until=None)
    future = 0
    if until is None:
        horizon = latest + AHEAD
        future = store.count(replace(selected, since=horizon))
        until = horizon if future else None
    if days is not None:
        newest = store.newest(replace(selected, until=until))
        since = None if newest is None else newest - timedelta(days=days)
    return replace(selected, since=since, until=until), future


def read_window(
    store: JudgmentStore,
    where: JudgmentFilter,
    *,
    future: int = 0,
    trusted: Collection[int] = (),
    progress: Progress,
) -> Window:
    """Stream the selected judgments into arrays.

    Parameters
    ----------
    store : JudgmentStore
    where : JudgmentFilter
    future : int
        As `choose` returns it.
    trusted : collection of int
        Numbers of appended batches, as in the store's chain, to which no cap by day applies.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    Window
    """
    # Packed buffers: lists of Python objects would take several times the memory.
    ids, pairs, prompts = bytearray(), bytearray(), bytearray()
    targets, inclusion, times = array("f"), array("d"), array("d")
    subsets, batches = array("i"), array("i")
    # −1 for no subset, so that the others count from 0.
    subset_of: dict[str | None, int] = {None: -1}
    batch_of: dict[str | None, int] = {}
    annotators, annotator_of, days = array("i"), dict[str, int](), array("q")
    day_of = arrival_days(store.chain(), trusted)
    for row in store.observations(where):
        ids += row.id
        pairs += row.pair
        prompts += row.prompt[:PROMPT_BYTES]
        targets.append(row.share)
        inclusion.append(1.0 if row.inclusion is None else row.inclusion)
        times.append(row.judged_at.timestamp())
        subsets.append(subset_of.setdefault(row.subset, len(subset_of) - 1))
        batches.append(batch_of.setdefault(row.batch, len(batch_of)))
        days.append(day_of.get(row.link, -1))
        annotators.append(annotator_of.setdefault(row.annotator, len(annotator_of)))
        if len(targets) % 10_000 == 0:
            progress("reading judgments", len(targets), 0)
    keys, pair_of = np.unique(np.frombuffer(bytes(pairs), f"S{KEY}"), return_inverse=True)
    probabilities = np.frombuffer(inclusion).copy()
    names = sorted(name for name in subset_of if name is not None)
    # From the order of first appearance to the sorted names, None first.
    order = np.array([names.index(n) if n is not None else -1 for n in subset_of], np.int32)
    codes = np.frombuffer(subsets, np.int32)
    people = sorted(annotator_of)
    # Codes follow the sorted names, so that they do not depend on the order of reading.
    ranks = np.argsort(np.argsort(list(annotator_of)))
    coded = ranks[np.frombuffer(annotators, np.int32)] if people else np.zeros(0, np.int64)
    return Window(
        _digest(bytes(ids)),
        keys,
        pair_of.astype(np.int32),
        np.frombuffer(targets, np.float32).astype(np.float64),
        probabilities,
        inclusion_weights(probabilities, np.frombuffer(batches, np.int32)).weights,
        np.frombuffer(bytes(prompts), ">i8").astype(np.int64),
        np.frombuffer(times).copy(),
        order[codes + 1],
        tuple(names),
        where,
        future,
        coded,
        np.frombuffer(days, np.int64).copy(),
        tuple(people),
    )


def arrival_days(chain: Chain, trusted: Collection[int] = ()) -> dict[int, int]:
    """Return the day on which each batch of a store arrived, in days since 1970 in UTC.

    Parameters
    ----------
    chain : Chain
    trusted : collection of int
        Numbers of batches that an operator confirms.

    Returns
    -------
    dict of int to int
        By the batch's number; without trusted batches, those of an unknown day, and those of the
        store's first day, which no later writer can join.
    """
    days = {
        link.number: int(link.appended_at.timestamp() // 86400)
        for link in chain.links
        if link.appended_at is not None
    }
    known = [link.appended_at is not None for link in chain.links]
    # A store from before the chain has a first day, too, that is unknown.
    first = min(days.values()) if days and known[0] else None
    return {k: day for k, day in days.items() if day != first and k not in set(trusted)}


def _digest(ids: bytes) -> str:
    # Sorted, so that the digest does not depend on the order of reading.
    return hashlib.sha256(np.sort(np.frombuffer(ids, f"S{KEY}")).tobytes()).hexdigest()
