"""Judgments as numbers want them: dated, named, without texts, whichever side stood first."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Select, func, select

from ensemble_rm.judgments.database.queries import conditions
from ensemble_rm.judgments.database.tables import judgments
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import SHARES


class Observation(NamedTuple):
    """One judgment without its texts.

    Attributes
    ----------
    id, pair, prompt : bytes
        Names of the judgment, of its pair whichever side stood first, and of its prompt; 16 bytes.
    judged_at : datetime
        In UTC.
    share : float
        Of the vote that went to the pair's own first side, the one whose digest is lower: 1, 0, or
        ½ for a tie.
    inclusion : float, optional
        Probability with which the pair was selected.
    subset, batch : str, optional
        As the judgment names them.
    """

    id: bytes
    pair: bytes
    prompt: bytes
    judged_at: datetime
    share: float
    inclusion: float | None
    subset: str | None
    batch: str | None


def dated(where: JudgmentFilter) -> Select[Any]:
    """Select what an observation is read from, by time and id."""
    c = judgments.c
    return (
        select(
            *(c.id, c.pair_key, c.prompt_key, c.judged_at, c.outcome, c.first, c.second),
            *(c.inclusion, c.subset, c.batch),
        )
        .where(*conditions(where))
        .order_by(c.judged_at, c.id)
    )


def read_observation(row: Any) -> Observation:
    """Return the observation of a row of `dated`."""
    name, pair, prompt, judged_at, outcome, first, second, inclusion, subset, batch = row
    share = SHARES[outcome]
    if first > second:
        share = 1.0 - share
    return Observation(name, pair, prompt, judged_at, share, inclusion, subset, batch)


def latest(where: JudgmentFilter) -> Select[Any]:
    """Select when the last of the selected judgments was given."""
    return select(func.max(judgments.c.judged_at)).where(*conditions(where))
