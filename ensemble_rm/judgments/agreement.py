"""Agreement between annotators, ties, and position bias.

One pass over the store by prompt and pair, so that memory grows with the number of annotators and
their couples, not with the number of judgments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from ensemble_rm.arrays import Floats, finite_or_none
from ensemble_rm.errors import DataError
from ensemble_rm.judgments.filter import ALL_JUDGMENTS, JudgmentFilter
from ensemble_rm.judgments.judgment import OUTCOMES, Verdict
from ensemble_rm.judgments.kappa import figure, item_agreement, kappa, share
from ensemble_rm.judgments.store import BATCH, JudgmentStore
from ensemble_rm.metrics import Interval
from ensemble_rm.progress import Progress, silent

GROUPS = 64
FIRST, SECOND, TIE = range(3)
TURNED = (SECOND, FIRST, TIE)


@dataclass(frozen=True, slots=True)
class Rater:
    """One annotator, compared with the others on the same pairs.

    Attributes
    ----------
    annotator : str
    judgments : int
    ties : Interval
        Share of ties among the judgments.
    first_side : Interval
        Share of the first side among the judgments other than ties.
    shared : int
        Pairs that others judged as well.
    agreement, kappa : Interval
        With another annotator, drawn at random for each pair; raw and beyond chance.
    repeats : int
        Judgments of a pair that the annotator had judged before.
    self_agreement : float
        Share of the repeats with the same outcome as before.
    """

    annotator: str
    judgments: int
    ties: Interval
    first_side: Interval
    shared: int
    agreement: Interval
    kappa: Interval
    repeats: int
    self_agreement: float


@dataclass(frozen=True, slots=True)
class Couple:
    """Two annotators on the pairs that both judged.

    Attributes
    ----------
    annotators : tuple of str
    shared : int
        Pairs.
    agreement, kappa : float
        Raw, and beyond chance (Cohen).
    """

    annotators: tuple[str, str]
    shared: int
    agreement: float
    kappa: float


@dataclass(frozen=True)
class AgreementReport:
    """The result of `agreement_report`; intervals are 95 %, robust to clustering by prompt.

    Attributes
    ----------
    judgments, prompts, pairs : int
    shared : int
        Pairs with two annotators or more, from which agreement is computed. An annotator's last
        judgment of a pair counts.
    equal_sides : int
        Judgments between two equal texts, which are not used otherwise.
    ties : Interval
        Share of ties among the judgments.
    first_side : Interval
        Share of the first side among the judgments other than ties. One half means no position
        bias only if sides were shown in random order.
    swapped : int
        Pairs that were judged in both orders.
    first_side_swapped : Interval
        On these, the mean of the first side's shares in either order, with ties as half: one half
        means no position bias, in whatever order the sides were shown.
    agreement : Interval
        Of two annotators of one pair, drawn at random.
    fleiss_kappa : Interval
        The same beyond chance.
    raters : tuple of Rater
        By name.
    couples : tuple of Couple
        By name; those with a pair in common.
    """

    judgments: int
    prompts: int
    pairs: int
    shared: int
    equal_sides: int
    ties: Interval
    first_side: Interval
    swapped: int
    first_side_swapped: Interval
    agreement: Interval
    fleiss_kappa: Interval
    raters: tuple[Rater, ...]
    couples: tuple[Couple, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the figures for JSON, with None for unknown values."""
        row: dict[str, Any] = finite_or_none(asdict(self))
        return row


def agreement_report(
    store: JudgmentStore, where: JudgmentFilter = ALL_JUDGMENTS, *, progress: Progress = silent
) -> AgreementReport:
    """Report the agreement of annotators, ties and position bias.

    Parameters
    ----------
    store : JudgmentStore
    where : JudgmentFilter
        Which judgments.
    progress : callable
        Called with (stage, done, total).

    Returns
    -------
    AgreementReport

    Raises
    ------
    DataError
        If no judgment is selected.
    """
    total = store.count(where)
    if total == 0:
        raise DataError(
            f"{store.name} contains no selected judgment; change the selection, or import some"
        )
    tally = _Tally()
    for _, verdicts in groupby(
        _reported(store.verdicts_by_pair(where), total, progress), attrgetter("prompt")
    ):
        tally.add_prompt(verdicts)
    return tally.report()


def _reported(verdicts: Iterable[Verdict], total: int, progress: Progress) -> Iterator[Verdict]:
    for done, verdict in enumerate(verdicts, start=1):
        yield verdict
        if done % BATCH == 0 or done == total:
            progress("counting", done, total)


class _Person:
    """Sums of one annotator, by group of prompts."""

    def __init__(self) -> None:
        self.shown = np.zeros((GROUPS, 3))  # verdicts, sides as shown
        # Of shared pairs: number, agreement with the others, own ties, the others' ties.
        self.rest = np.zeros((GROUPS, 4))
        self.repeats = self.same = 0


class _Tally:
    """Sums over prompts; the jackknife's groups are drawn by the prompts' digests."""

    def __init__(self) -> None:
        self.prompts = self.pairs = self.equal = self.swapped_pairs = 0
        self.items = np.zeros((GROUPS, 3))  # shared pairs, their agreement, their ties' share
        self.swapped = np.zeros((GROUPS, 2))
        self.people: dict[str, _Person] = {}
        self.couples: dict[tuple[str, str], Floats] = {}  # columns as in `_Person.rest`

    def add_prompt(self, verdicts: Iterable[Verdict]) -> None:
        """Add the judgments of one prompt, ordered by pair and time."""
        self.prompts += 1
        for _, judged in groupby(verdicts, attrgetter("pair")):
            self._add_pair(list(judged))

    def _add_pair(self, judged: list[Verdict]) -> None:
        self.pairs += 1
        if judged[0].equal:
            self.equal += len(judged)
            return
        # By prompt, because judgments of one prompt are dependent.
        group = int.from_bytes(judged[0].prompt[:8]) % GROUPS
        # Without repeats: an annotator counts once per pair, with the last verdict.
        last: dict[str, int] = {}
        orders = np.zeros((2, 2))  # per order: points of the side shown first, judgments
        for one in judged:
            person = self.people.setdefault(one.annotator, _Person())
            shown = OUTCOMES.index(one.outcome)
            person.shown[group, shown] += 1
            orders[int(one.flipped)] += ((1.0, 0.0, 0.5)[shown], 1.0)
            outcome = TURNED[shown] if one.flipped else shown
            if one.annotator in last:
                person.repeats += 1
                person.same += last[one.annotator] == outcome
            last[one.annotator] = outcome
        if orders[:, 1].all():
            self.swapped_pairs += 1
            self.swapped[group] += (float((orders[:, 0] / orders[:, 1]).mean()), 1.0)
        if len(last) > 1:
            self._add_shared(group, last)

    def _add_shared(self, group: int, last: dict[str, int]) -> None:
        # (3,): annotators by verdict.
        counts = np.bincount(list(last.values()), minlength=3).astype(np.float64)
        others = len(last) - 1
        self.items[group] += (1.0, item_agreement(counts), counts[TIE] / len(last))
        for name, outcome in last.items():
            tie = float(outcome == TIE)
            self.people[name].rest[group] += (
                # Without the annotator's own vote.
                *(1.0, (counts[outcome] - 1) / others),
                *(tie, (counts[TIE] - tie) / others),
            )
        ordered = sorted(last.items())
        for i, (name, outcome) in enumerate(ordered):
            for other, other_outcome in ordered[i + 1 :]:
                sums = self.couples.setdefault((name, other), np.zeros(4))
                sums += (1.0, outcome == other_outcome, outcome == TIE, other_outcome == TIE)

    def report(self) -> AgreementReport:
        """Compute the report from the sums."""
        shown = np.sum([person.shown for person in self.people.values()], axis=0)
        # The sum over no annotators is a scalar.
        shown = np.zeros((GROUPS, 3)) + shown
        return AgreementReport(
            judgments=int(shown.sum()) + self.equal,
            prompts=self.prompts,
            pairs=self.pairs,
            shared=int(self.items[:, 0].sum()),
            equal_sides=self.equal,
            ties=_ties(shown),
            first_side=_first_side(shown),
            swapped=self.swapped_pairs,
            first_side_swapped=share(self.swapped),
            agreement=share(self.items[:, (1, 0)]),
            fleiss_kappa=figure(self.items, _fleiss),
            raters=tuple(_rater(name, self.people[name]) for name in sorted(self.people)),
            couples=tuple(_couple(names, self.couples[names]) for names in sorted(self.couples)),
        )


def _fleiss(sums: Floats) -> float:
    """Kappa of (items, their agreement, their ties' share)."""
    if sums[0] <= 0:
        return math.nan
    ties = float(sums[2] / sums[0])
    return kappa(float(sums[1] / sums[0]), ties, ties)


def _cohen(sums: Floats) -> float:
    """Kappa of (pairs, agreement, own ties, the others' ties)."""
    if sums[0] <= 0:
        return math.nan
    agreement, own, others = (float(value) for value in sums[1:] / sums[0])
    return kappa(agreement, own, others)


def _ties(shown: Floats) -> Interval:
    return share(np.stack([shown[:, TIE], shown.sum(axis=1)], axis=1))


def _first_side(shown: Floats) -> Interval:
    return share(np.stack([shown[:, FIRST], shown[:, FIRST] + shown[:, SECOND]], axis=1))


def _rater(name: str, person: _Person) -> Rater:
    return Rater(
        annotator=name,
        judgments=int(person.shown.sum()),
        ties=_ties(person.shown),
        first_side=_first_side(person.shown),
        shared=int(person.rest[:, 0].sum()),
        agreement=share(person.rest[:, (1, 0)]),
        kappa=figure(person.rest, _cohen),
        repeats=person.repeats,
        self_agreement=person.same / person.repeats if person.repeats else math.nan,
    )


def _couple(names: tuple[str, str], sums: Floats) -> Couple:
    return Couple(names, int(sums[0]), float(sums[1] / sums[0]), _cohen(sums))
