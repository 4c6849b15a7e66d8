"""Label Studio's exports, JSON and JSON_MIN → judgments.

In JSON a task holds its annotations; in JSON_MIN each annotation is a row with the task's data
spread out. A pairwise control says ``left`` or ``right``, left being the first name of its
``toName``; a choice among labels may say tie, too. Knows nothing of files or the store.
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

FIELDS = ("prompt", "answer1", "answer2")
QUESTION = "comparison"
KINDS = ("pairwise", "choices")


def read_task(line: int, task: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read a task of the format JSON: a row an annotation."""
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
    texts = Texts.named(options, *FIELDS)
    item = _pick(annotation.get("result"), options.question)
    label = _label(item.get("value"), options) if item is not None else _empty(options)
    turned = item is not None and _turned(item, texts)
    found = texts.read(task["data"], turned=turned)
    found |= read_optional(task["data"], task.get("meta"))
    return _row(
        line, annotation, annotation.get("completed_by"), texts.outcome(label), found, options
    )


def read_min(line: int, row: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read a row of the format JSON_MIN, where left is the field named first."""
    texts, question = Texts.named(options, *FIELDS), options.question or QUESTION
    if row.get("annotation_id") is None:
        yield Row(line, "unlabelled")
        return
    said = row.get(question)
    if isinstance(said, list) and len(said) > 1:
        raise DataError(f"{question!r} holds {len(said)} verdicts; one is needed")
    value = said[0] if isinstance(said, list) and said else said
    label = _empty(options) if value in (None, []) else _label(value, options)
    found = texts.read(row) | read_optional(row)
    annotation = {**row, "id": row["annotation_id"]}
    yield _row(line, annotation, row.get("annotator"), texts.outcome(label), found, options)


def _row(
    line: int,
    annotation: Mapping[str, Any],
    annotator: object,
    outcome: str,
    found: dict[str, Any],
    options: ImportOptions,
) -> Row:
    if annotation.get("id") is None:
        raise DataError("the annotation has no `id`, which tells a repeated import from a new one")
    judged_at = _time(annotation, "created_at", options)
    judgment = Judgment(
        **found,
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
    """Return the region that holds the verdict; None where nothing was selected."""
    if not isinstance(result, list) or not all(isinstance(item, Mapping) for item in result):
        raise DataError(f"the annotation's `result` must be a list of objects, not {result!r}")
    if question is None:
        items = [item for item in result if item.get("type") in KINDS]
        names = sorted({str(item.get("from_name")) for item in items})
        if len(names) > 1:
            raise DataError(f"holds verdicts of {names}; say which with `question` (--question)")
    else:
        items = [item for item in result if item.get("from_name") == question]
    if len(items) > 1:
        raise DataError(f"holds {len(items)} verdicts of one control; one is needed")
    return items[0] if items else None


def _label(value: object, options: ImportOptions) -> object:
    """Return what was selected: a pairwise side, or the one label of a choice."""
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
        "the annotation was submitted without a selection; read such ones as ties with "
        "`empty_is_tie` (--empty-is-tie) if that is what they mean"
    )


def _turned(item: Mapping[str, Any], texts: Texts) -> bool:
    """Whether the second field stood on the left: ``toName`` lists them from the left."""
    named = [name.strip() for name in str(item.get("to_name", "")).split(",")]
    return item.get("type") == "pairwise" and named == [texts.second, texts.first]


def _name(annotator: object) -> str:
    """Return the annotator's address, else the number: the same in both formats."""
    if isinstance(annotator, Mapping):
        annotator = annotator.get("email") or annotator.get("id")
    if annotator is None or isinstance(annotator, bool):
        raise DataError(f"the annotation does not say who made it: {annotator!r}")
    return str(annotator)


def _time(annotation: Mapping[str, Any], name: str, options: ImportOptions) -> datetime:
    value = annotation.get(name)
    if value is None and options.judged_at is not None:
        return options.judged_at
    if value is None:
        raise DataError(f"the annotation has no `{name}`; give `judged_at` (--judged-at)")
    return parse_time(value, assume_utc=options.assume_utc)
