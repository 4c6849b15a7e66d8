"""Read judgments: the selections as SQL, and rows as judgments, verdicts or observations."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, func, select

from ensemble_rm.data.samples import as_prompt
from ensemble_rm.errors import DataError, StoreIntegrityError
from ensemble_rm.judgments.database.chain import RESTORE
from ensemble_rm.judgments.database.checking import RowChecker, raw_rows
from ensemble_rm.judgments.database.tables import erasures, judgments, texts
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import RETRACTED, SHARES, Judgment, Verdict

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
        clauses.append(judgments.c.outcome != RETRACTED)
    # Not even the history has the texts of erased judgments.
    clauses.append(
        ~select(erasures.c.judgment).where(erasures.c.judgment == judgments.c.id).exists()
    )
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
    """Select raw rows by id."""
    return raw_rows().where(*conditions(where)).order_by(judgments.c.id)


def newest(where: JudgmentFilter) -> Select[Any]:
    """Select the raw row of the newest selected judgment."""
    c = judgments.c
    query = raw_rows().where(*conditions(where), c.outcome != RETRACTED)
    return query.order_by(c.judged_at.desc(), c.id.desc()).limit(1)


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


def by_id(ids: Collection[str]) -> Iterator[Select[Any]]:
    """Yield selections of whole judgments, corrected ones too, for any number of ids."""
    history, ordered = JudgmentFilter(with_corrected=True), sorted(ids)
    for start in range(0, len(ordered), ROWS_AT_ONCE):
        part = [bytes.fromhex(id_) for id_ in ordered[start : start + ROWS_AT_ONCE]]
        yield whole(history).where(judgments.c.id.in_(part))


def verdicts(where: JudgmentFilter, *, by_pair: bool = False) -> Select[Any]:
    """Select raw rows with a verdict, by time and id, or by prompt and pair first."""
    c = judgments.c
    groups = (c.prompt_key, c.pair_key) if by_pair else ()
    query = raw_rows().where(*conditions(where), c.outcome != RETRACTED)
    return query.order_by(*groups, c.judged_at, c.id)


def read_verdict(row: Any) -> Verdict:
    """Return the verdict of a raw row."""
    _, _, first, second, prompt, pair, outcome, annotator, *_ = row
    # The outcome refers to the sides as shown; `flipped` relates it to the pair's own order.
    return Verdict(pair, prompt, annotator, outcome, first > second, first == second)


@contextmanager
def stream(connection: Connection, query: Select[Any]) -> Iterator[Iterator[Any]]:
    """Fetch rows in batches; on PostgreSQL with a server-side cursor."""
    with connection.execute(query, execution_options={"yield_per": ROWS_AT_ONCE}) as rows:
        yield iter(rows)


@contextmanager
def stream_checked(
    connection: Connection, query: Select[Any], store: str
) -> Iterator[Iterator[Any]]:
    """Fetch raw rows in batches, each compared with its id before any of it is yielded.

    Raises
    ------
    StoreIntegrityError
        If a row was changed after it was written.
    """
    checker = RowChecker(connection, store)

    def checked(result: Any) -> Iterator[Any]:
        for rows in result.partitions(ROWS_AT_ONCE):
            checker.check(rows)
            yield from rows

    with connection.execute(query, execution_options={"yield_per": ROWS_AT_ONCE}) as result:
        yield checked(result)


def read_judgment(row: Any, store: str) -> Judgment:
    """Return the judgment of a row of `whole`.

    Raises
    ------
    StoreIntegrityError
        If the row or one of its texts was changed after it was written.
    """
    corrects = None if row.corrects is None else row.corrects.hex()
    try:
        judgment = Judgment(
            as_prompt(json.loads(row.prompt_body)),
            json.loads(row.first_body),
            json.loads(row.second_body),
            corrects=corrects,
            **{name: getattr(row, name) for name in COLUMNS},
        )
    except (DataError, ValueError) as error:
        raise StoreIntegrityError(
            f"{store}: judgment {row.id.hex()} was changed by hand ({error}); {RESTORE}"
        ) from error
    # The id is a digest of the content, so it reveals a change.
    if judgment.id != row.id.hex():
        raise StoreIntegrityError(
            f"{store}: judgment {row.id.hex()} was changed by hand (its content now has the id "
            f"{judgment.id}); {RESTORE}"
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
    link : int
        Number of the batch that appended the judgment; see `JudgmentStore.chain`.
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
    link: int


def read_observation(row: Any) -> Observation:
    """Return the observation of a raw row."""
    id_, _, first, second, prompt, pair, outcome, annotator, time, *rest = row
    _, _, batch, _, subset, _, inclusion, _, link = rest
    share = SHARES[outcome]
    # The same pair may be shown in either order: votes refer to the lower digest.
    if first > second:
        share = 1.0 - share
    at = read_time(time)
    return Observation(id_, pair, prompt, at, share, inclusion, subset, batch, annotator, link)


def read_time(value: str | datetime) -> datetime:
    """Return the time of a raw row: text in SQLite, in UTC in both databases."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value.astimezone(UTC)
