"""Select unjudged pairs for humans, with their sides in random order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ensemble_rm.active_learning.acquisition import STRATEGIES, score_pool, utility
from ensemble_rm.active_learning.design import plan_draw
from ensemble_rm.data.samples import Preference, Preferences, Prompt, prompt_key
from ensemble_rm.data.weights import SampleWeights, inclusion_weights
from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
from ensemble_rm.ensemble.streaming import DEFAULT_CHUNK
from ensemble_rm.errors import DataError, OptionError
from ensemble_rm.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class SelectedPair:
    """A pair for a human to judge.

    Attributes
    ----------
    prompt : str or tuple of Message
    first, second : str
        The completions in the order in which they are shown.
    external_id : str
        Id of the pair in the pool; a digest of its texts where it has none.
    strategy : str
        Strategy by which it was selected.
    inclusion : float
        Inclusion probability π in (0, 1].
    subset : str, optional
        Slice of the pair.
    """

    prompt: Prompt
    first: str
    second: str
    external_id: str
    strategy: str
    inclusion: float
    subset: str | None = None


@dataclass(frozen=True)
class SelectedPairs:
    """Selected pairs, and the pool that they were drawn from.

    Attributes
    ----------
    pairs : tuple of SelectedPair
        In the order of the pool.
    pool : int
        Number of pairs that could be drawn.
    prompts : int
        Number of their prompts.
    repeated, equal_sides : int
        Number of pairs left out because they repeat an earlier one, in either order, and because
        both completions are the same text.
    floor : float
        Smallest π in the pool, which `thin_to_equal` needs.
    seed : int
        Seed of the draw and of the sides.
    """

    pairs: tuple[SelectedPair, ...]
    pool: int
    prompts: int
    repeated: int
    equal_sides: int
    floor: float
    seed: int

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def weights(self) -> SampleWeights:
        """Weight of each pair, 1/π scaled to mean 1, with their effective sample size."""
        return inclusion_weights([pair.inclusion for pair in self.pairs])


def pair_name(pair: Preference) -> str:
    """Return a digest of a pair's texts, the same in either order: 32 hexadecimal digits."""
    # Sorted: the same pair in the other order is the same pair.
    texts = (prompt_key(pair.prompt), *sorted((pair.chosen, pair.rejected)))
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def pair_names(pairs: Preferences) -> list[str]:
    """Return the pairs' names: their ids, or digests of their texts.

    Raises
    ------
    DataError
        If two different pairs have the same id.
    """
    names, owners = [], dict[str, str]()
    for pair in pairs:
        texts = pair_name(pair)
        name = pair.id or texts
        # One id on two texts would give one judgment to both.
        if owners.setdefault(name, texts) != texts:
            raise DataError(
                f"two different pairs of {pairs.source} have the id {name!r}; give each its own, "
                "or leave ids out"
            )
        names.append(name)
    return names


def select_pairs(
    ensemble: RewardEnsemble | None,
    pool: Preferences,
    *,
    budget: int,
    strategy: str = "bald",
    random_share: float = 0.3,
    max_per_prompt: int | None = 1,
    sharpness: float = 1.0,
    seed: int = 0,
    chunk: int = DEFAULT_CHUNK,
    progress: Progress = silent,
) -> SelectedPairs:
    """Select the pairs that are worth a human's time, each with a known inclusion probability.

    Parameters
    ----------
    ensemble : RewardEnsemble, optional
        Scores the pool; not needed for the strategy ``"random"``.
    pool : Preferences
        Unjudged pairs from `read_comparisons`; verdicts are ignored.
    budget : int
        Number of pairs to select.
    strategy : {"bald", "margin", "disagreement", "random"}
        See `utility`.
    random_share : float
        In [0, 1], the expected share of draws that do not depend on the strategy. It bounds the
        weights 1/π.
    max_per_prompt : int, optional
        Maximum number of pairs per prompt (None: no limit).
    sharpness : float
        How steeply π depends on the rank of the utility, see `plan_draw`.
    seed : int
        Seed of the draw and of the sides.
    chunk : int
        Maximum number of samples per call.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    SelectedPairs

    Raises
    ------
    OptionError
        If an option is out of range, or the budget exceeds the pool.
    DataError
        If two different pairs have the same id.
        If there is no pair to select from.
    NotCalibratedError, OneMemberError
        If the strategy needs a calibration or several members.
    """
    if strategy not in STRATEGIES:
        raise OptionError(f"strategy must be one of {STRATEGIES}, not {strategy!r}")
    if ensemble is None and strategy != "random":
        raise OptionError(f"strategy {strategy!r} needs an ensemble; only 'random' does not")
    kept, names, repeated, equal = _distinct(pool)
    groups, subsets = kept.groups, sorted({s or "" for s in kept.subsets})
    value = None
    # Bad options raise before anything is scored.
    limits = {"budget": budget, "max_per_prompt": max_per_prompt, "sharpness": sharpness}
    options = limits | {"random_share": random_share, "strata": _strata(kept, subsets)}
    # A design without utilities raises on bad options before hours of scoring.
    design = plan_draw(None, groups, **options)  # type: ignore[arg-type]
    if ensemble is not None and strategy != "random":
        value = utility(score_pool(ensemble, kept, chunk=chunk, progress=progress), strategy)
        design = plan_draw(value, groups, **options)  # type: ignore[arg-type]
    drawn = design.draw(seed=seed)
    inclusion = design.inclusion
    # Sides in random order: annotators favour a position.
    coins = np.random.default_rng([seed, 1]).random(len(drawn)) < 0.5
    selected = [
        _selected(kept[int(i)], names[int(i)], strategy, float(inclusion[i]), swapped=bool(coin))
        for i, coin in zip(drawn, coins, strict=True)
    ]
    prompts = int(groups.max()) + 1
    return SelectedPairs(tuple(selected), len(kept), prompts, repeated, equal, design.floor, seed)


def pairs_for_humans(
    pairs: Preferences,
    names: list[str],
    pending: NDArray[np.bool_],
    *,
    audit_share: float,
    seed: int,
    strategy: str,
) -> SelectedPairs:
    """Return pending pairs and a random share of the others, with inclusion probabilities.

    Parameters
    ----------
    pairs : Preferences
    names : list of str
        From `pair_names`. Rows of one name are one pair, which is pending if any of them is.
    pending : ndarray of bool, shape (n_pairs,)
        Rows that are always included, π = 1.
    audit_share : float
        π of the other pairs, in [0, 1].
    seed : int
        Seed of the draws and of the random order of the sides.
    strategy : str
        Name of the strategy in the result.
    """
    audit, sides = np.random.default_rng(seed).random((2, len(pairs)))
    # Repeated pairs are asked once, under the name they share.
    _, first, name_of = np.unique(names, return_index=True, return_inverse=True)
    pending_names = np.zeros(len(first), dtype=np.bool_)
    np.logical_or.at(pending_names, name_of, pending)
    selected = []
    for index in np.argsort(first).tolist():  # in the order of the pairs
        row = int(first[index])
        # Audit: a share of the certain pairs shows whether the certainty is right.
        if pending_names[index] or audit[row] < audit_share:
            inclusion = 1.0 if pending_names[index] else audit_share
            swap = bool(sides[row] < 0.5)
            selected.append(_selected(pairs[row], names[row], strategy, inclusion, swapped=swap))
    floor = audit_share if audit_share > 0 and not pending_names.all() else 1.0
    repeated = len(pairs) - len(first)
    prompts = len(pairs.prompt_keys)
    return SelectedPairs(tuple(selected), len(first), prompts, repeated, 0, floor, seed)


def _selected(
    pair: Preference, name: str, strategy: str, inclusion: float, *, swapped: bool
) -> SelectedPair:
    first, second = (pair.rejected, pair.chosen) if swapped else (pair.chosen, pair.rejected)
    return SelectedPair(pair.prompt, first, second, name, strategy, inclusion, pair.subset)


def _strata(pool: Preferences, names: list[str]) -> list[int]:
    """Return each pair's stratum: the index of the subset of its prompt's first pair."""
    index_of = {name: i for i, name in enumerate(names)}
    first: dict[int, int] = {}
    numbers = (index_of[subset or ""] for subset in pool.subsets)
    return [
        first.setdefault(g, number) for g, number in zip(pool.groups.tolist(), numbers, strict=True)
    ]


def _distinct(pool: Preferences) -> tuple[Preferences, list[str], int, int]:
    """Leave out repeated pairs and equal completions; return the others and their names."""
    seen: set[str] = set()
    rows, equal = [], 0
    for i, pair in enumerate(pool):
        if pair.chosen == pair.rejected:
            equal += 1
            continue
        texts = pair_name(pair)
        if texts not in seen:
            seen.add(texts)
            rows.append(i)
    if not rows:
        raise DataError(f"{pool.source} has no pair to select from ({len(pool)} read)")
    kept = pool.take(rows)
    return kept, pair_names(kept), len(pool) - equal - len(rows), equal
