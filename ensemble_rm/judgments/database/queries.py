"""Read judgments: the selections as SQL, and rows as judgments, verdicts or observations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, func, select

from ensemble_rm.data.samples import as_prompt
from ensemble_rm.errors import StorageError
from ensemble_rm.judgments.database.tables import judgments, texts
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import SHARES, Judgment, Verdict

COLUMNS: tuple[str, ...] = (
    *("outcome", "annotator", "judged_at", "source", "external_id"),
    *("batch", "policy", "subset", "strategy", "inclusion"),
)
ROWS_AT_ONCE = 1000  # maximum values of an IN clause, and rows of a fetch


def conditions(where: JudgmentFilter) -> list[ColumnElement[bool]]:
    """Return the SQL conditions of a filter."""
    clauses: list[ColumnElement[bool]] = []
    if where.since is not None:
        clauses.append(judgments.c.judged_at >= where.since)
    if where.until is not None:
        clauses.append(judgments.c.judged_at < where.until)
    clauses += [judgments.c[name].in_(values) for name, values in where.names.items()]
    if where.excluded:
        clauses.append(judgments.c.annotator.not_in(where.excluded))
    if not where.with_corrected:
        newer = judgments.alias("newer")
        clauses.append(~select(newer.c.id).where(newer.c.corrects == judgments.c.id).exists())
    return clauses


def counting(where: JudgmentFilter) -> Select[Any]:
    """Count the selected judgments."""
    return select(func.count()).select_from(judgments).where(*conditions(where))


def conversations(where: JudgmentFilter) -> Select[Any]:
    """Select one judgment whose prompt is a list of messages."""
    # Bodies are JSON: a text starts with a quotation mark, a list of messages with a bracket.
    query = select(judgments.c.id).join(texts, texts.c.digest == judgments.c.prompt)
    return query.where(texts.c.body.startswith("["), *conditions(where)).limit(1)


def ids(where: JudgmentFilter) -> Select[Any]:
    """Select the ids, sorted."""
    return select(judgments.c.id).where(*conditions(where)).order_by(judgments.c.id)


def whole(where: JudgmentFilter) -> Select[Any]:
    """Select whole judgments, by time and id."""
    # The same table three times: each distinct text is stored once.
    prompt, first, second = (texts.alias(name) for name in ("prompts", "firsts", "seconds"))
    return (
        select(
            judgments.c.id,
            judgments.c.corrects,
            *(judgments.c[name] for name in COLUMNS),
            prompt.c.body.label("prompt_body"),
            first.c.body.label("first_body"),
            second.c.body.label("second_body"),
        )
        .join(prompt, prompt.c.digest == judgments.c.prompt)
        .join(first, first.c.digest == judgments.c.first)
        .join(second, second.c.digest == judgments.c.second)
        .where(*conditions(where))
        .order_by(judgments.c.judged_at, judgments.c.id)
    )


def verdicts(where: JudgmentFilter, *, by_pair: bool = False) -> Select[Any]:
    """Select verdicts without texts, by time and id, or by prompt and pair first."""
    c = judgments.c
    groups = (c.prompt_key, c.pair_key) if by_pair else ()
    return (
        select(c.pair_key, c.prompt_key, c.annotator, c.outcome, c.first, c.second)
        .where(*conditions(where))
        .order_by(*groups, c.judged_at, c.id)
    )


def read_verdict(row: Any) -> Verdict:
    """Return the verdict of a row of `verdicts`."""
    pair, prompt, annotator, outcome, first, second = row
    # The outcome refers to the sides as shown; `flipped` relates it to the pair's own order.
    return Verdict(pair, prompt, annotator, outcome, first > second, first == second)


@contextmanager
def stream(connection: Connection, query: Select[Any]) -> Iterator[Iterator[Any]]:
    """Fetch rows in batches; on PostgreSQL with a server-side cursor."""
    with connection.execute(query, execution_options={"yield_per": ROWS_AT_ONCE}) as rows:
        yield iter(rows)


def read_judgment(row: Any, store: str) -> Judgment:
    """Return the judgment of a row of `whole`.

    Raises
    ------
    StorageError
        If the row was changed after it was written.
    """
    corrects = None if row.corrects is None else row.corrects.hex()
    judgment = Judgment(
        as_prompt(json.loads(row.prompt_body)),
        json.loads(row.first_body),
        json.loads(row.second_body),
        corrects=corrects,
        **{name: getattr(row, name) for name in COLUMNS},
    )
    # The id is a digest of the content, so it reveals a change.
    if judgment.id != row.id.hex():
        raise StorageError(
            f"{store}: judgment {row.id.hex()} was changed by hand (its content now has the id "
            f"{judgment.id}); restore the store from a backup"
        )
    return judgment


# Observations -----------------------------------------------------------------------------------


class Observation(NamedTuple):
    """A judgment without its texts, for fits.

    Attributes
    ----------
    id, pair, prompt : bytes
        Digests of the judgment, of its pair whichever side was first, and of its prompt; 16 bytes.
    judged_at : datetime
        In UTC.
    share : float
        Share of the vote for the side with the lower digest: 1, 0, or ½ for a tie.
    inclusion : float, optional
        The pair's selection probability.
    subset, batch : str, optional
        As in the judgment.
    annotator : str
        As in the judgment.
    """

    id: bytes
    pair: bytes
    prompt: bytes
    judged_at: datetime
    share: float
    inclusion: float | None
    subset: str | None
    batch: str | None
    annotator: str


def observations(where: JudgmentFilter) -> Select[Any]:
    """Select the columns of observations, by time and id."""
    c = judgments.c
    return (
        select(
            *(c.id, c.pair_key, c.prompt_key, c.judged_at, c.outcome, c.first, c.second),
            *(c.inclusion, c.subset, c.batch, c.annotator),
        )
        .where(*conditions(where))
        .order_by(c.judged_at, c.id)
    )


def read_observation(row: Any) -> Observation:
    """Return the observation of a row of `observations`."""
    id_, pair, prompt, judged_at, outcome, first, second, *rest = row
    inclusion, subset, batch, annotator = rest
    share = SHARES[outcome]
    # The same pair may be shown in either order: votes refer to the lower digest.
    if first > second:
        share = 1.0 - share
    return Observation(id_, pair, prompt, judged_at, share, inclusion, subset, batch, annotator)


def newest(where: JudgmentFilter) -> Select[Any]:
    """Select the time of the newest selected judgment."""
    return select(func.max(judgments.c.judged_at)).where(*conditions(where))
