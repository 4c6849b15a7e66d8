"""What is asked of the tables, as SQL; rows to judgments and back."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, func, select
from sqlalchemy.dialects import postgresql, sqlite

from ensemble_rm.data.samples import as_prompt
from ensemble_rm.errors import StorageError
from ensemble_rm.judgments.database.tables import judgments, texts
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.judgment import Judgment, Verdict, digest, text_body

PLAIN: tuple[str, ...] = (
    *("outcome", "annotator", "judged_at", "source", "external_id"),
    *("batch", "policy", "subset", "strategy", "inclusion"),
)
SAID = ("outcome", "annotator", "batch", "policy", "subset", "strategy", "inclusion")
AT_ONCE = 1000  # values in one IN, rows in one fetch


class Held(NamedTuple):
    """What is stored under an external id.

    Attributes
    ----------
    first, latest : str
        Id of the judgment that holds the external id, and of the end of its corrections.
    content : bytes
        What `content_of` says of the latest.
    judged_at : datetime
        Its time.
    """

    first: str
    latest: str
    content: bytes
    judged_at: datetime


def content_of(one: Judgment) -> bytes:
    """Name what a judgment says but for its time, its external id and what it corrects."""
    return _content(one.text_digests, [getattr(one, name) for name in SAID])


def _content(sides: Sequence[bytes], said: Sequence[object]) -> bytes:
    return digest([part.hex() for part in sides], list(said))


# Reading -------------------------------------------------------------------------------------


def conditions(where: JudgmentFilter) -> list[ColumnElement[bool]]:
    """Return what a selected judgment fulfils."""
    found: list[ColumnElement[bool]] = []
    if where.since is not None:
        found.append(judgments.c.judged_at >= where.since)
    if where.until is not None:
        found.append(judgments.c.judged_at < where.until)
    found += [judgments.c[name].in_(values) for name, values in where.names.items()]
    if not where.with_corrected:
        newer = judgments.alias("newer")
        found.append(~select(newer.c.id).where(newer.c.corrects == judgments.c.id).exists())
    return found


def counting(where: JudgmentFilter) -> Select[Any]:
    """How many."""
    return select(func.count()).select_from(judgments).where(*conditions(where))


def conversations(where: JudgmentFilter) -> Select[Any]:
    """One whose prompt is no text but a list."""
    query = select(judgments.c.id).join(texts, texts.c.digest == judgments.c.prompt)
    return query.where(texts.c.body.startswith("["), *conditions(where)).limit(1)


def names(where: JudgmentFilter) -> Select[Any]:
    """Their ids, sorted."""
    return select(judgments.c.id).where(*conditions(where)).order_by(judgments.c.id)


def whole(where: JudgmentFilter) -> Select[Any]:
    """All of each, by time and id."""
    prompt, first, second = (texts.alias(name) for name in ("prompts", "firsts", "seconds"))
    return (
        select(
            judgments.c.id,
            judgments.c.corrects,
            *(judgments.c[name] for name in PLAIN),
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


def bare(where: JudgmentFilter, *, by_pair: bool = False) -> Select[Any]:
    """Their verdicts alone: by time and id, or by prompt and pair first."""
    c = judgments.c
    groups = (c.prompt_key, c.pair_key) if by_pair else ()
    return (
        select(c.pair_key, c.prompt_key, c.annotator, c.outcome, c.first, c.second)
        .where(*conditions(where))
        .order_by(*groups, c.judged_at, c.id)
    )


def read_verdict(row: Any) -> Verdict:
    """Return the verdict of a row of `bare`."""
    pair, prompt, annotator, outcome, first, second = row
    return Verdict(pair, prompt, annotator, outcome, first > second, first == second)


@contextmanager
def stream(connection: Connection, query: Select[Any]) -> Iterator[Iterator[Any]]:
    """Fetch rows some at a time, by a cursor on the server where there is one."""
    with connection.execute(query, execution_options={"yield_per": AT_ONCE}) as rows:
        yield iter(rows)


def read_row(row: Any, place: str) -> Judgment:
    """Return the judgment of a row of `whole`.

    Raises
    ------
    StorageError
        If the row is not what was written.
    """
    corrects = None if row.corrects is None else row.corrects.hex()
    found = Judgment(
        as_prompt(json.loads(row.prompt_body)),
        json.loads(row.first_body),
        json.loads(row.second_body),
        corrects=corrects,
        **{name: getattr(row, name) for name in PLAIN},
    )
    if found.id != row.id.hex():
        raise StorageError(
            f"{place}: judgment {row.id.hex()} was changed by hand (it now reads as {found.id}); "
            "restore the store from a copy"
        )
    return found


# Writing -------------------------------------------------------------------------------------


def insert(connection: Connection, rows: Collection[Judgment]) -> int:
    """Insert judgments and their texts, what is there already left alone; return how many are new.

    Rows go in one order, the same for every writer, so that two writers wait for one another
    instead of blocking each other.
    """
    if not rows:
        return 0
    upsert: Any = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    bodies: dict[bytes, Any] = {}
    for one in rows:
        sides = (one.prompt, one.first, one.second)
        bodies.update(zip(one.text_digests, sides, strict=True))
    connection.execute(
        upsert(texts).on_conflict_do_nothing(),
        [{"digest": key, "body": text_body(bodies[key])} for key in sorted(bodies)],
    )
    ordered = sorted(rows, key=lambda one: (one.source, one.external_id))
    # The ids that come back, since drivers do not count the rows of many inserts alike.
    new = upsert(judgments).on_conflict_do_nothing().returning(judgments.c.id)
    return len(connection.execute(new, [_written(one) for one in ordered]).all())


def _written(one: Judgment) -> dict[str, Any]:
    prompt, first, second = one.text_digests
    row = {name: getattr(one, name) for name in PLAIN}
    row |= {"id": bytes.fromhex(one.id), "prompt": prompt, "first": first, "second": second}
    row |= {"prompt_key": one.prompt_digest, "pair_key": one.pair_digest}
    return row | {"corrects": one.corrects and bytes.fromhex(one.corrects)}


def existing(connection: Connection, ids: Collection[str]) -> set[str]:
    """Return those of `ids` that are stored."""
    found: set[str] = set()
    for some in _parts(ids):
        query = select(judgments.c.id).where(judgments.c.id.in_([bytes.fromhex(i) for i in some]))
        found |= {row.id.hex() for row in connection.execute(query)}
    return found


def holders(connection: Connection, rows: Collection[Judgment]) -> dict[tuple[str, str], str]:
    """Return the id that holds each judgment's source and external id, where one does."""
    found: dict[tuple[str, str], str] = {}
    by_source: dict[str, set[str]] = {}
    for one in rows:
        by_source.setdefault(one.source, set()).add(one.external_id)
    for source, external in by_source.items():
        for some in _parts(external):
            query = select(judgments.c.external_id, judgments.c.id).where(
                judgments.c.source == source, judgments.c.external_id.in_(some)
            )
            for row in connection.execute(query):
                found[source, row.external_id] = row.id.hex()
    return found


def corrections(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """Return the id of the judgment that corrects each of `ids`, where one does."""
    found: dict[str, str] = {}
    c = judgments.c
    for some in _parts(ids):
        query = select(c.corrects, c.id).where(c.corrects.in_([bytes.fromhex(i) for i in some]))
        for row in connection.execute(query):
            found[row.corrects.hex()] = row.id.hex()
    return found


def latest(connection: Connection, ids: Collection[str]) -> dict[str, str]:
    """Return the end of each judgment's chain of corrections: itself where there is none."""
    found = {one: one for one in ids}
    open_ = set(ids)
    while newer := corrections(connection, open_):
        found = {one: newer.get(end, end) for one, end in found.items()}
        open_ = set(newer.values())
    return found


def held(connection: Connection, rows: Collection[Judgment]) -> dict[tuple[str, str], Held]:
    """Return what holds each judgment's source and external id, where something does."""
    holding = holders(connection, rows)
    ends = latest(connection, set(holding.values()))
    found: dict[str, tuple[bytes, datetime]] = {}
    c = judgments.c
    for some in _parts(set(ends.values())):
        query = select(c.id, c.judged_at, c.prompt, c.first, c.second, *(c[name] for name in SAID))
        for row in connection.execute(query.where(c.id.in_([bytes.fromhex(i) for i in some]))):
            found[row.id.hex()] = (_content(row[2:5], row[5:]), row.judged_at)
    return {key: Held(first, ends[first], *found[ends[first]]) for key, first in holding.items()}


def _parts(values: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(values)
    return (ordered[i : i + AT_ONCE] for i in range(0, len(ordered), AT_ONCE))
