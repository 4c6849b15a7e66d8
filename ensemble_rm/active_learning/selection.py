"""`select_pairs`: a pool of unjudged pairs → those to ask a human about, sides at random."""

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
    """A pair that a human is asked about.

    Attributes
    ----------
    prompt : str or tuple of Message
    first, second : str
        The completions, in the order in which they are shown.
    external_id : str
        The pool's own name of the pair; made of its texts where it has none.
    strategy : str
        How it was selected.
    inclusion : float
        Probability π in (0, 1] with which it was.
    subset : str, optional
        The slice that the pair belongs to.
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
    """What was selected, and from what.

    Attributes
    ----------
    pairs : tuple of SelectedPair
        In the order of the pool.
    pool : int
        Pairs that could be drawn.
    prompts : int
        Prompts among them.
    repeated, equal_sides : int
        Pairs of the file that were left out: those that repeat an earlier one, whichever side
        stands first, and those whose completions are the same text.
    floor : float
        The smallest π of the pool: what `thin_to_equal` needs.
    seed : int
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
        """1/π of each pair, of mean 1, and what the pairs are worth together."""
        return inclusion_weights([pair.inclusion for pair in self.pairs])


def pair_name(pair: Preference) -> str:
    """Return a name of a pair's texts, whichever side stands first: 32 hexadecimal digits."""
    texts = (prompt_key(pair.prompt), *sorted((pair.chosen, pair.rejected)))
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def pair_names(pairs: Preferences) -> list[str]:
    """Return the pairs' names: their ids, or what their texts make.

    Raises
    ------
    DataError
        If two different pairs bear one id.
    """
    names, owners = [], dict[str, str]()
    for pair in pairs:
        texts = pair_name(pair)
        name = pair.id or texts
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
    """Select the pairs that are worth a human's time, each with a known probability.

    Parameters
    ----------
    ensemble : RewardEnsemble, optional
        Scores the pool; the strategy ``"random"`` needs none.
    pool : Preferences
        Unjudged pairs, as `read_comparisons` reads them; verdicts do not count.
    budget : int
        How many to select: exactly so many are.
    strategy : {"bald", "margin", "disagreement", "random"}
        See `utility`.
    random_share : float
        In [0, 1]: the expected share of draws that the strategy does not decide. It bounds the
        weights 1/π.
    max_per_prompt : int, optional
        Most pairs of one prompt; no limit where not given.
    sharpness : float
        How steeply π rises with the rank of the utility, see `plan_draw`.
    seed : int
        Of the draw and of the sides.
    chunk : int
        Most samples scored at once.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    SelectedPairs

    Raises
    ------
    OptionError
        If an option cannot be used, or the pool does not hold the budget.
    DataError
        If two different pairs bear one id.
        If there is no pair to choose from.
    NotCalibratedError, OneMemberError
        If the strategy asks of the ensemble what it does not have.
    """
    if strategy not in STRATEGIES:
        raise OptionError(f"strategy must be one of {STRATEGIES}, not {strategy!r}")
    if ensemble is None and strategy != "random":
        raise OptionError(f"strategy {strategy!r} needs an ensemble; only 'random' needs none")
    kept, names, repeated, equal = _distinct(pool)
    groups, subsets = kept.groups, sorted({s or "" for s in kept.subsets})
    value = None
    # Options are refused before anything is scored.
    limits = {"budget": budget, "max_per_prompt": max_per_prompt, "sharpness": sharpness}
    options = limits | {"random_share": random_share, "strata": _strata(kept, subsets)}
    design = plan_draw(None, groups, **options)  # type: ignore[arg-type]
    if ensemble is not None and strategy != "random":
        value = utility(score_pool(ensemble, kept, chunk=chunk, progress=progress), strategy)
        design = plan_draw(value, groups, **options)  # type: ignore[arg-type]
    drawn = design.draw(seed=seed)
    inclusion = design.inclusion
    coins = np.random.default_rng([seed, 1]).random(len(drawn)) < 0.5
    found = [
        _selected(kept[int(i)], names[int(i)], strategy, float(inclusion[i]), swapped=bool(coin))
        for i, coin in zip(drawn, coins, strict=True)
    ]
    prompts = int(groups.max()) + 1
    return SelectedPairs(tuple(found), len(kept), prompts, repeated, equal, design.floor, seed)


def pairs_for_humans(
    pairs: Preferences,
    names: list[str],
    waiting: NDArray[np.bool_],
    *,
    audit_share: float,
    seed: int,
    strategy: str,
) -> SelectedPairs:
    """Return the pairs for humans, each name once, with its probability of being among them.

    Parameters
    ----------
    pairs : Preferences
    names : list of str
        Of `pair_names`; rows of one name are one pair, which is drawn once and waits where any of
        them does.
    waiting : ndarray of bool, shape (n_pairs,)
        Rows that are among them for certain, π = 1.
    audit_share : float
        In [0, 1]: π of the others.
    seed : int
        Of the draws, and of the sides, which stand in random order.
    strategy : str
        The name that they bear.
    """
    audit, sides = np.random.default_rng(seed).random((2, len(pairs)))
    _, first, of = np.unique(names, return_index=True, return_inverse=True)
    waits = np.zeros(len(first), dtype=np.bool_)
    np.logical_or.at(waits, of, waiting)
    found = []
    for one in np.argsort(first).tolist():  # in the order of the pairs
        row = int(first[one])
        if waits[one] or audit[row] < audit_share:
            inclusion = 1.0 if waits[one] else audit_share
            swap = bool(sides[row] < 0.5)
            found.append(_selected(pairs[row], names[row], strategy, inclusion, swapped=swap))
    floor = audit_share if audit_share > 0 and not waits.all() else 1.0
    repeated = len(pairs) - len(first)
    prompts = len(pairs.prompt_keys)
    return SelectedPairs(tuple(found), len(first), prompts, repeated, 0, floor, seed)


def _selected(
    pair: Preference, name: str, strategy: str, inclusion: float, *, swapped: bool
) -> SelectedPair:
    first, second = (pair.rejected, pair.chosen) if swapped else (pair.chosen, pair.rejected)
    return SelectedPair(pair.prompt, first, second, name, strategy, inclusion, pair.subset)


def _strata(pool: Preferences, names: list[str]) -> list[int]:
    """Return the number of each pair's stratum: the subset of its prompt's first pair."""
    place = {name: i for i, name in enumerate(names)}
    first: dict[int, int] = {}
    numbers = (place[subset or ""] for subset in pool.subsets)
    return [
        first.setdefault(g, number) for g, number in zip(pool.groups.tolist(), numbers, strict=True)
    ]


def _distinct(pool: Preferences) -> tuple[Preferences, list[str], int, int]:
    """Leave out pairs that need no judgment of their own; name the others."""
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
        raise DataError(f"{pool.source} holds no pair to choose from ({len(pool)} read)")
    kept = pool.take(rows)
    return kept, pair_names(kept), len(pool) - equal - len(rows), equal
