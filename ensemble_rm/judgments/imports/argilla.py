"""Argilla's records, as exported by `records.to_json` and `records.to_list`.

Nested records contain responses by question, flattened ones contain columns of values and users. A
label question can express ties; a ranking question exported as a list of names cannot. Argilla
exports no times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from ensemble_rm.errors import DataError
from ensemble_rm.judgments.imports.formats import (
    ImportFormat,
    ImportOptions,
    Row,
    TextFields,
    read_optional,
    require_source,
)
from ensemble_rm.judgments.judgment import Judgment, parse_time

FIELDS = ("prompt", "first", "second")
COLUMN = ".responses"


def read_record(line: int, record: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read a record: one verdict per response."""
    responses = _responses(record, options.question)
    if not responses:
        yield Row(line, "unlabelled")
    for response in responses:
        try:
            yield _read_response(line, record, response, options)
        except DataError as error:
            yield Row(line, error)


def _responses(record: Mapping[str, Any], question: str | None) -> list[Any]:
    """Return the responses to the question; flattened columns are joined into rows."""
    nested = record.get("responses")
    if isinstance(nested, Mapping):
        by_question = {name: responses for name, responses in nested.items() if responses}
    else:
        keys = [key for key in record if key.endswith(COLUMN)]
        by_question = {key.removesuffix(COLUMN): _join(record, key) for key in keys if record[key]}
    if question is None:
        if len(by_question) > 1:
            raise DataError(
                f"has responses to {sorted(by_question)}; choose one with `question` (--question)"
            )
        responses: Any = next(iter(by_question.values()), [])
    else:
        responses = by_question.get(question, [])
    if not isinstance(responses, list):
        raise DataError(f"responses must be a list, not {responses!r}")
    return responses


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
        raise DataError("the record's `id` or the response's `user_id` is missing")
    texts = TextFields.from_options(options, *FIELDS)
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


def _outcome(value: object, texts: TextFields) -> str:
    """Return the outcome of a label, or of a ranking of the two completions."""
    if not isinstance(value, list):
        return texts.outcome(value)
    if len(value) != 2:
        raise DataError(f"a ranking must contain the two completions, not {value!r}")
    if all(isinstance(item, Mapping) and "value" in item for item in value):
        ranks = [item.get("rank", position) for position, item in enumerate(value)]
        if ranks[0] == ranks[1]:
            return "tie"
        value = [item["value"] for item in (value if ranks[0] < ranks[1] else value[::-1])]
    best, other = map(texts.outcome, value)
    if {best, other} != {"first", "second"}:
        raise DataError(f"a ranking must contain the two completions, not {value!r}")
    return best


def _time(
    response: Mapping[str, Any], metadata: Mapping[str, Any], options: ImportOptions
) -> datetime:
    given = response.get("updated_at") or response.get("inserted_at") or metadata.get("judged_at")
    if given is not None:
        return parse_time(given, assume_utc=options.assume_utc)
    if options.judged_at is None:
        raise DataError(
            "Argilla exports no times; give one for all responses with `judged_at` "
            "(--judged-at), or put `judged_at` into the records' metadata"
        )
    return options.judged_at


FORMAT = ImportFormat("argilla", read_record)
