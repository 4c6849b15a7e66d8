"""Rater drift: whether humans still judge an anchor set as they did.

A pair's anchor verdict is the most frequent vote of the month in which it was first judged; a pair
without a most frequent vote has none. A later vote agrees if it equals that verdict: first, second
or tie. The votes that determined it are not compared, because they would agree with themselves.

Tests of one month, with Holm's correction over all of them:

- each annotator's agreement against the same annotator's in all earlier months: Fisher's exact
  test [1]_;
- the panel's: over pairs that were also judged before, the mean agreement now − then, with signs
  flipped pair by pair [2]_, because votes on one pair are dependent;
- position bias, each annotator's and the panel's: votes for the side shown first, ties left out,
  against ½; exact binomial of one vote per pair, and signs flipped pair by pair. It assumes that
  sides were shown in random order.

Knows votes and judgments; knows nothing of scores or stores.

References
----------
.. [1] Fisher 1935: the design of experiments.
.. [2] Fisher 1935; Efron 1969: tests by symmetry, signs flipped.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import binomtest, fisher_exact

from ensemble_rm.arrays import Floats
from ensemble_rm.drift.multiplicity import (
    holm,
    level_of,
    permutation_p,
    permutations_for,
)
from ensemble_rm.errors import DataError
from ensemble_rm.judgments.judgment import SHARES, Judgment
from ensemble_rm.saved_json import from_row

PANEL = ""  # annotator name of rows that pool all annotators
MIN_VOTES = 10  # an annotator's month with fewer votes is reported but not tested


@dataclass(frozen=True, slots=True)
class AnchorVote:
    """One verdict on an anchor pair.

    Attributes
    ----------
    pair : str
        The pair's name, whichever side was shown first.
    annotator : str
        Who judged.
    month : str
        ``"2026-03"``; any ISO period that sorts by time.
    outcome : float
        P(first) of what was shown: 1 where the first won, 0 the second, ½ a tie.
    swapped : bool
        Whether the sides were shown the other way round than the pair's name has them.
    """

    pair: str
    annotator: str
    month: str
    outcome: float
    swapped: bool = False

    def __post_init__(self) -> None:
        if self.outcome not in (0.0, 0.5, 1.0):
            raise DataError(f"an anchor's outcome is 1, 0 or ½ of one vote, not {self.outcome!r}")
        if not self.annotator or not re.match(r"\d{4}\b", self.month):
            raise DataError(f"an anchor vote needs an annotator and a month, not {self!r}")

    @property
    def verdict(self) -> float:
        """P(first) of the pair as its name has it."""
        return 1.0 - self.outcome if self.swapped else self.outcome


@dataclass(frozen=True)
class RaterCell:
    """One annotator's month.

    Attributes
    ----------
    annotator : str
        Empty for the panel.
    month : str
    votes : int
        Votes on anchor pairs.
    compared, agreed : int
        Votes of later months on pairs with an anchor verdict, and those that equal it.
    first, decided : int
        Votes for the side shown first, and votes other than ties.
    """

    annotator: str
    month: str
    votes: int
    compared: int
    agreed: int
    first: int
    decided: int

    @property
    def agreement(self) -> float:
        """Share that agreed; NaN without votes."""
        return self.agreed / self.compared if self.compared else float("nan")

    @property
    def first_share(self) -> float:
        """Share of decided votes for the side shown first; NaN without votes."""
        return self.first / self.decided if self.decided else float("nan")


@dataclass(frozen=True)
class RaterTest:
    """One test of the month.

    Attributes
    ----------
    kind : str
        ``"agreement"`` or ``"position"``.
    annotator : str
        Empty for the panel.
    before, now : float
        Agreement in earlier months and in this; ½ and the share of first.
    p, adjusted : float
        Before and after Holm's correction.
    alarm : bool
        adjusted ≤ the level of this check.
    """

    kind: str
    annotator: str
    before: float
    now: float
    p: float
    adjusted: float = 1.0
    alarm: bool = False


@dataclass(frozen=True)
class RaterDrift:
    """The tests of one month's anchor votes.

    Attributes
    ----------
    month : str
        The month that is tested.
    cells : tuple of RaterCell
        Every annotator and month up to it, and the panel.
    tests : tuple of RaterTest
        Of this month.
    alpha : float
        Bound on P(any alarm in all checks) if no rater changes and none is biased.
    checks : int
        Number of checks that share `alpha`.
    """

    month: str
    cells: tuple[RaterCell, ...]
    tests: tuple[RaterTest, ...]
    alpha: float
    checks: int

    @property
    def alarm(self) -> bool:
        """Whether any test of the month alarms."""
        return any(test.alarm for test in self.tests)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, d: Any) -> RaterDrift:
        """Read what `to_json` wrote, else `SchemaError`."""
        return from_row(cls, d, former={"looks": "checks"})


def anchor_votes(judgments: Iterable[Judgment]) -> list[AnchorVote]:
    """Turn judgments of anchor pairs into votes, whichever side was shown first.

    Parameters
    ----------
    judgments : iterable of Judgment
        Of anchor pairs only, without corrected ones.

    Returns
    -------
    list of AnchorVote
        In the same order; months are in UTC.
    """
    return [
        AnchorVote(
            judgment.pair_digest.hex(),
            judgment.annotator,
            f"{judgment.judged_at:%Y-%m}",
            SHARES[judgment.outcome],
            swapped=judgment.text_digests[1] > judgment.text_digests[2],
        )
        for judgment in judgments
        if not judgment.is_retraction
    ]


def rater_drift(
    votes: Iterable[AnchorVote],
    *,
    month: str | None = None,
    alpha: float = 0.05,
    checks: int = 1,
    seed: int = 0,
) -> RaterDrift:
    """Tabulate agreement by annotator and month, and test one month against those before it.

    Parameters
    ----------
    votes : iterable of AnchorVote
        Of all months, in any order.
    month : str, optional
        The month to test (default: the latest); later votes are ignored.
    alpha : float
        Bound on P(any alarm in all checks) if nothing changes.
    checks : int
        Number of months that will be tested.
    seed : int
        Of the random signs.

    Returns
    -------
    RaterDrift

    Raises
    ------
    DataError
        If there is no vote up to the month.
    """
    level = level_of(alpha, checks)
    given = list(votes)
    last = month if month is not None else max((vote.month for vote in given), default="")
    kept = sorted((vote for vote in given if vote.month <= last), key=_order)
    if not kept:
        raise DataError(f"no anchor vote up to {last or 'any month'}; judge the anchors first")
    marks = _marks(kept)
    cells = _cells(kept, marks)
    tests = _annotators_agreement(cells, last) + _annotators_position(kept, last)
    n = permutations_for(level, len(tests) + 2)
    panel = (_panel_agreement(kept, marks, last, n, seed), _panel_position(kept, last, n, seed))
    tests += [test for test in panel if test is not None]
    adjusted = holm([test.p for test in tests])
    tested = (
        replace(test, adjusted=float(a), alarm=bool(a <= level))
        for test, a in zip(tests, adjusted, strict=True)
    )
    return RaterDrift(last, cells, tuple(tested), alpha, checks)


def _order(vote: AnchorVote) -> tuple[str, str, str, float, bool]:
    return (vote.month, vote.annotator, vote.pair, vote.outcome, vote.swapped)


def _marks(votes: Sequence[AnchorVote]) -> list[bool | None]:
    """Return whether each vote agrees, in order of time; None where it cannot be compared."""
    begun: dict[str, str] = {}
    panels: dict[str, Counter[float]] = defaultdict(Counter)
    for vote in votes:
        if begun.setdefault(vote.pair, vote.month) == vote.month:
            panels[vote.pair][vote.verdict] += 1
    anchors = {pair: _most_frequent(panel) for pair, panel in panels.items()}
    marks: list[bool | None] = []
    for vote in votes:
        # The first month made the anchor: comparing its votes would be circular.
        anchor = None if vote.month == begun[vote.pair] else anchors[vote.pair]
        marks.append(None if anchor is None else vote.verdict == anchor)
    return marks


def _most_frequent(verdicts: Counter[float]) -> float | None:
    ranked = verdicts.most_common(2)
    # A tie has no most frequent verdict to compare with.
    return None if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def _cells(votes: Sequence[AnchorVote], marks: Sequence[bool | None]) -> tuple[RaterCell, ...]:
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * 5)
    for vote, mark in zip(votes, marks, strict=True):
        flags = (1, mark is not None, mark is True, vote.outcome == 1.0, vote.outcome != 0.5)
        for annotator in (vote.annotator, PANEL):
            row = counts[annotator, vote.month]
            for i, flag in enumerate(flags):
                row[i] += int(flag)
    return tuple(RaterCell(*key, *counts[key]) for key in sorted(counts))


def _annotators_agreement(cells: Sequence[RaterCell], month: str) -> list[RaterTest]:
    tests = []
    for cell in cells:
        if cell.month != month or cell.annotator == PANEL or cell.compared < MIN_VOTES:
            continue
        past = [c for c in cells if c.annotator == cell.annotator and c.month < month]
        compared, agreed = sum(c.compared for c in past), sum(c.agreed for c in past)
        if compared >= MIN_VOTES:
            table = [[cell.agreed, cell.compared - cell.agreed], [agreed, compared - agreed]]
            p = float(fisher_exact(table).pvalue)
            tests.append(
                RaterTest("agreement", cell.annotator, agreed / compared, cell.agreement, p)
            )
    return tests


def _annotators_position(votes: Sequence[AnchorVote], month: str) -> list[RaterTest]:
    once: dict[str, dict[str, float]] = defaultdict(dict)
    for vote in votes:
        if vote.month == month and vote.outcome != 0.5:
            # The binomial test needs independent votes: one per pair.
            once[vote.annotator].setdefault(vote.pair, vote.outcome)
    tests = []
    for annotator, seen in sorted(once.items()):
        if len(seen) >= MIN_VOTES:
            first = int(sum(seen.values()))
            p = float(binomtest(first, len(seen), 0.5).pvalue)
            tests.append(RaterTest("position", annotator, 0.5, first / len(seen), p))
    return tests


def _panel_agreement(
    votes: Sequence[AnchorVote], marks: Sequence[bool | None], month: str, n: int, seed: int
) -> RaterTest | None:
    then: dict[str, list[float]] = defaultdict(list)
    now: dict[str, list[float]] = defaultdict(list)
    for vote, mark in zip(votes, marks, strict=True):
        if mark is not None:
            (now if vote.month == month else then)[vote.pair].append(float(mark))
    pairs = [pair for pair in now if pair in then]
    if len(pairs) < MIN_VOTES:
        return None
    # A mean per pair, because votes on one pair are dependent; both (n_pairs,).
    before, after = (np.array([np.mean(part[pair]) for pair in pairs]) for part in (then, now))
    p = _flipped(after - before, n, seed)
    return RaterTest("agreement", PANEL, float(before.mean()), float(after.mean()), p)


def _panel_position(votes: Sequence[AnchorVote], month: str, n: int, seed: int) -> RaterTest | None:
    shown: dict[str, list[float]] = defaultdict(list)
    for vote in votes:
        if vote.month == month and vote.outcome != 0.5:
            shown[vote.pair].append(vote.outcome - 0.5)
    if len(shown) < MIN_VOTES:
        return None
    lead = np.array([np.mean(part) for part in shown.values()])
    return RaterTest("position", PANEL, 0.5, float(0.5 + lead.mean()), _flipped(lead, n, seed))


def _flipped(differences: Floats, n: int, seed: int) -> float:
    """Return the two-sided p-value of a mean of 0, signs flipped at random."""
    # (n, n_differences)
    signs = np.random.default_rng(seed).integers(0, 2, (n, len(differences))) * 2.0 - 1
    return permutation_p(abs(float(differences.sum())), np.abs(signs @ differences))
