"""The library's own JSONL, with the fields of `Judgment`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ensemble_rm.data.loading import read_jsonl
from ensemble_rm.errors import DataError
from ensemble_rm.judgments.imports.formats import ImportFormat, ImportOptions, Row
from ensemble_rm.judgments.judgment import REQUIRED, Judgment


def read_row(line: int, row: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read one judgment; options fill in a missing source or time."""
    defaults = {"source": options.source, "judged_at": options.judged_at}
    given = {name: value for name, value in defaults.items() if value is not None}
    filled = {**row, **{name: given[name] for name in given if row.get(name) is None}}
    # The likeliest field to lack, and the one that the user can set for all rows at once.
    if [name for name in REQUIRED if filled.get(name) is None] == ["source"]:
        raise DataError("needs `source`; set it for all rows with `source` (--source)")
    judgment = Judgment.from_json(filled, assume_utc=options.assume_utc)
    yield Row(line, judgment)


FORMAT = ImportFormat("jsonl", read_row, read_jsonl, needs_source=False)
