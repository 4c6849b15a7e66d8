"""Argilla's records, as `records.to_json` and `records.to_list` give them → judgments.

Nested records hold responses by question, flattened ones in columns beside their users. A label
question tells ties; a ranking question exported as a list of names has lost them. Argilla exports
no times. Knows nothing of files or the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from ensemble_rm.errors import DataError
from ensemble_rm.judgments.imports.rows import (
    ImportOptions,
    Row,
    Texts,
    read_optional,
    require_source,
)
from ensemble_rm.judgments.judgment import Judgment, parse_time

FIELDS = ("prompt", "first", "second")
COLUMN = ".responses"


def read_record(line: int, record: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read a record: a row a response."""
    responses = _responses(record, options.question)
    if not responses:
        yield Row(line, "unlabelled")
    for response in responses:
        try:
            yield _read_response(line, record, response, options)
        except DataError as error:
            yield Row(line, error)


def _responses(record: Mapping[str, Any], question: str | None) -> list[Any]:
    """Return the responses to the question, flattened columns joined again."""
    nested = record.get("responses")
    if isinstance(nested, Mapping):
        asked = {name: said for name, said in nested.items() if said}
    else:
        ends = [key for key in record if key.endswith(COLUMN)]
        asked = {key.removesuffix(COLUMN): _join(record, key) for key in ends if record[key]}
    if question is None:
        if len(asked) > 1:
            raise DataError(
                f"holds responses to {sorted(asked)}; say which question with `question` "
                "(--question)"
            )
        found: Any = next(iter(asked.values()), [])
    else:
        found = asked.get(question, [])
    if not isinstance(found, list):
        raise DataError(f"responses must be a list, not {found!r}")
    return found


def _join(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    columns = {"value": record[key], "user_id": record.get(f"{key}.users")}
    if record.get(f"{key}.status") is not None:
        columns["status"] = record[f"{key}.status"]
    sizes = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(sizes) > 1 or -1 in sizes:
        raise DataError(f"the columns of {key!r} are not lists of one length: {columns}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _read_response(
    line: int, record: Mapping[str, Any], response: Any, options: ImportOptions
) -> Row:
    if not isinstance(response, Mapping):
        raise DataError(f"a response must be an object, not {response!r}")
    status = response.get("status")
    if status not in (None, "submitted"):
        return Row(line, f"a response that is {status}")
    if record.get("id") is None or response.get("user_id") is None:
        raise DataError("needs the record's `id` and the response's `user_id`")
    texts = Texts.named(options, *FIELDS)
    nested, metadata = record.get("fields"), record.get("metadata")
    fields = nested if isinstance(nested, Mapping) else record
    judged_at = _time(response, metadata if isinstance(metadata, Mapping) else record, options)
    judgment = Judgment(
        **texts.read(fields),
        **read_optional(metadata, record),
        outcome=_outcome(response.get("value"), texts),  # type: ignore[arg-type]
        annotator=str(response["user_id"]),
        judged_at=judged_at,
        source=require_source(options, "argilla"),
        external_id=f"{record['id']}:{response['user_id']}",
    )
    return Row(line, judgment, judged_at)


def _outcome(value: object, texts: Texts) -> str:
    """Return what a label, or a ranking of the two, says."""
    if not isinstance(value, list):
        return texts.outcome(value)
    if len(value) != 2:
        raise DataError(f"a ranking must hold the two completions, not {value!r}")
    if all(isinstance(item, Mapping) and "value" in item for item in value):
        ranks = [item.get("rank", place) for place, item in enumerate(value)]
        if ranks[0] == ranks[1]:
            return "tie"
        value = [item["value"] for item in (value if ranks[0] < ranks[1] else value[::-1])]
    best, other = map(texts.outcome, value)
    if {best, other} != {"first", "second"}:
        raise DataError(f"a ranking must hold the two completions, not {value!r}")
    return best


def _time(
    response: Mapping[str, Any], metadata: Mapping[str, Any], options: ImportOptions
) -> datetime:
    given = response.get("updated_at") or response.get("inserted_at") or metadata.get("judged_at")
    if given is not None:
        return parse_time(given, assume_utc=options.assume_utc)
    if options.judged_at is None:
        raise DataError(
            "Argilla exports no times; say when the responses were given with `judged_at` "
            "(--judged-at), or keep it in the records' metadata"
        )
    return options.judged_at
