"""Label Studio's exports, JSON and JSON_MIN.

In JSON a task contains its annotations; in JSON_MIN each annotation is a row with the task's data
as columns. A pairwise control says ``left`` or ``right``, where left is the first name of its
``toName``; a choice among labels can also say tie.
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

FIELDS = ("prompt", "answer1", "answer2")
QUESTION = "comparison"
KINDS = ("pairwise", "choices")


def read_task(line: int, task: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read a task of the format JSON: one verdict per annotation."""
    annotations, data = task.get("annotations"), task.get("data")
    if not isinstance(annotations, list) or not isinstance(data, Mapping):
        raise DataError(
            f"a task of Label Studio's JSON needs `data` and `annotations`; has {sorted(task)} "
            "(JSON_MIN is another format: label-studio-min)"
        )
    if not annotations:
        yield Row(line, "unlabelled")
    for annotation in annotations:
        try:
            yield _read_annotation(line, task, annotation, options)
        except DataError as error:
            yield Row(line, error)


def _read_annotation(
    line: int, task: Mapping[str, Any], annotation: Any, options: ImportOptions
) -> Row:
    if not isinstance(annotation, Mapping):
        raise DataError(f"an annotation must be an object, not {annotation!r}")
    if annotation.get("was_cancelled") or annotation.get("skipped"):
        return Row(line, "skipped by the annotator")
    texts = TextFields.from_options(options, *FIELDS)
    item = _pick(annotation.get("result"), options.question)
    label = _label(item.get("value"), options) if item is not None else _empty(options)
    swapped = item is not None and _swapped(item, texts)
    fields = texts.read(task["data"], swapped=swapped)
    fields |= read_optional(task["data"], task.get("meta"))
    return _row(
        line, annotation, annotation.get("completed_by"), texts.outcome(label), fields, options
    )


def read_min(line: int, row: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read a row of the format JSON_MIN, where left is the first text field."""
    texts, question = TextFields.from_options(options, *FIELDS), options.question or QUESTION
    if row.get("annotation_id") is None:
        yield Row(line, "unlabelled")
        return
    answer = row.get(question)
    if isinstance(answer, list) and len(answer) > 1:
        raise DataError(f"{question!r} has {len(answer)} verdicts; expected one")
    value = answer[0] if isinstance(answer, list) and answer else answer
    label = _empty(options) if value in (None, []) else _label(value, options)
    fields = texts.read(row) | read_optional(row)
    annotation = {**row, "id": row["annotation_id"]}
    yield _row(line, annotation, row.get("annotator"), texts.outcome(label), fields, options)


def _row(
    line: int,
    annotation: Mapping[str, Any],
    annotator: object,
    outcome: str,
    fields: dict[str, Any],
    options: ImportOptions,
) -> Row:
    if annotation.get("id") is None:
        raise DataError("the annotation has no `id`, by which a repeated import is recognised")
    judged_at = _time(annotation, "created_at", options)
    judgment = Judgment(
        **fields,
        outcome=outcome,  # type: ignore[arg-type]
        annotator=_name(annotator),
        judged_at=judged_at,
        source=require_source(options, "label-studio"),
        external_id=f"annotation:{annotation['id']}",
    )
    if annotation.get("updated_at") is None:
        return Row(line, judgment, judged_at)
    return Row(line, judgment, _time(annotation, "updated_at", options))


def _pick(result: object, question: str | None) -> Mapping[str, Any] | None:
    """Return the region with the verdict; None where nothing was selected."""
    if not isinstance(result, list) or not all(isinstance(item, Mapping) for item in result):
        raise DataError(f"the annotation's `result` must be a list of objects, not {result!r}")
    if question is None:
        items = [item for item in result if item.get("type") in KINDS]
        names = sorted({str(item.get("from_name")) for item in items})
        if len(names) > 1:
            raise DataError(f"has verdicts of {names}; choose one with `question` (--question)")
    else:
        items = [item for item in result if item.get("from_name") == question]
    if len(items) > 1:
        raise DataError(f"has {len(items)} verdicts of one control; expected one")
    return items[0] if items else None


def _label(value: object, options: ImportOptions) -> object:
    """Return the selection: a pairwise side, or the single label of a choice."""
    if not isinstance(value, Mapping):
        return value
    if "selected" in value:
        return value["selected"]
    choices = value.get("choices")
    if not isinstance(choices, list) or len(choices) > 1:
        raise DataError(f"the verdict must be one selection, not {dict(value)!r}")
    return choices[0] if choices else _empty(options)


def _empty(options: ImportOptions) -> str:
    if options.empty_is_tie:
        return "tie"
    raise DataError(
        "the annotation was submitted without a selection; if that means a tie, use `empty_is_tie` "
        "(--empty-is-tie)"
    )


def _swapped(item: Mapping[str, Any], texts: TextFields) -> bool:
    """Return whether the second field was shown on the left: ``toName`` lists left to right."""
    shown = [name.strip() for name in str(item.get("to_name", "")).split(",")]
    return item.get("type") == "pairwise" and shown == [texts.second, texts.first]


def _name(annotator: object) -> str:
    """Return the annotator's email, else the number: the same in both formats."""
    if isinstance(annotator, Mapping):
        annotator = annotator.get("email") or annotator.get("id")
    if annotator is None or isinstance(annotator, bool):
        raise DataError(f"the annotation names no annotator: {annotator!r}")
    return str(annotator)


def _time(annotation: Mapping[str, Any], name: str, options: ImportOptions) -> datetime:
    value = annotation.get(name)
    if value is None and options.judged_at is not None:
        return options.judged_at
    if value is None:
        raise DataError(f"the annotation has no `{name}`; give `judged_at` (--judged-at)")
    return parse_time(value, assume_utc=options.assume_utc)


FORMAT = ImportFormat("label-studio", read_task)
MIN_FORMAT = ImportFormat("label-studio-min", read_min)
