"""The library's own JSONL, with the fields of `Judgment`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ensemble_rm.data.loading import read_jsonl
from ensemble_rm.judgments.imports.formats import ImportFormat, ImportOptions, Row
from ensemble_rm.judgments.judgment import Judgment


def read_row(line: int, row: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    """Read one judgment; options fill in a missing source or time."""
    defaults = {"source": options.source, "judged_at": options.judged_at}
    missing = {name: value for name, value in defaults.items() if row.get(name) is None}
    yield Row(line, Judgment.from_json({**row, **missing}, assume_utc=options.assume_utc))


FORMAT = ImportFormat("jsonl", read_row, read_jsonl, needs_source=False)
