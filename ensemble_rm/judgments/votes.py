"""Judgments → preference pairs with votes, as calibration and training read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ensemble_rm.data.samples import Preference, Preferences
from ensemble_rm.judgments.judgment import SHARES, Judgment


@dataclass(slots=True)
class _Count:
    """Votes of one pair, with the sides in the order of its first judgment."""

    seen: Judgment
    first: float = 0.0
    second: float = 0.0
    ties: float = 0.0


def to_preferences(judgments: Iterable[Judgment], *, source: str = "judgments") -> Preferences:
    """Combine the judgments of each pair, whichever side was first, into votes.

    A judgment has the weight 1/π if it has a selection probability π (Horvitz & Thompson 1952),
    otherwise 1. A tie counts half for each side, and as one of the pair's tied votes. A pair's
    weight is the sum over its judgments, so that each judgment is one observation.

    Parameters
    ----------
    judgments : iterable of Judgment
        Without corrected ones.
    source : str
        Origin, for messages and provenance.

    Returns
    -------
    Preferences
        One per pair and subset, in the order of their first judgments; ``chosen`` is the first
        side there. Pairs of one prompt stay one group.
    """
    counts: dict[tuple[bytes, str | None], _Count] = {}
    for one in judgments:
        if one.is_retraction:  # part of a history; it has no verdict
            continue
        count = counts.setdefault((one.pair_digest, one.subset), _Count(one))
        weight = 1.0 if one.inclusion is None else 1.0 / one.inclusion
        share = SHARES[one.outcome]
        # Shown in the other order than the first judgment of this pair.
        if one.text_digests[1] != count.seen.text_digests[1]:
            share = 1.0 - share
        count.first += weight * share
        count.second += weight * (1.0 - share)
        count.ties += weight * (one.outcome == "tie")
    return Preferences(tuple(_preference(key[0], count) for key, count in counts.items()), source)


def _preference(pair: bytes, count: _Count) -> Preference:
    seen = count.seen
    return Preference(
        seen.prompt,
        seen.first,
        seen.second,
        weight=count.first + count.second,
        votes=(count.first, count.second),
        subset=seen.subset,
        id=pair.hex(),
        tie_votes=count.ties,
    )
