"""A format from outside the package: imported like the built-in ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm import Judgment, JudgmentStore, import_judgments
from ensemble_rm.errors import BadRowsError, DataError, OptionError
from ensemble_rm.judgments import ImportFormat, ImportOptions, Row, register_format
from ensemble_rm.judgments.imports.formats import FORMATS
from tests.support.judgment_rows import NEW_YEAR


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        prompt, better, worse = line.split("|")
        yield number, {"prompt": prompt, "better": better, "worse": worse}


def read_row(line: int, row: Mapping[str, Any], options: ImportOptions) -> Iterator[Row]:
    if row["better"] == row["worse"]:
        raise DataError("the two completions are equal")
    source = options.source or "unreachable"
    sides = (row["prompt"], row["better"], row["worse"])
    yield Row(line, Judgment(*sides, "first", "ann", NEW_YEAR, source))


BARS = ImportFormat("bars", read_row, read_lines)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ensemble_rm.judgments.imports.formats.FORMATS", dict(FORMATS), raising=True
    )
    assert register_format(BARS) is BARS


@pytest.mark.usefixtures("registered")
def test_a_registered_format_is_imported_like_the_built_in_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("p|good|bad\nq|fine|poor\n", encoding="utf-8")
    source = ImportOptions(source="outside")
    with JudgmentStore.create(tmp_path / "judgments.db") as store:
        with pytest.raises(OptionError, match="source"):
            import_judgments(store, path, format="bars")
        assert import_judgments(store, path, format="bars", options=source).added == 2
        assert import_judgments(store, path, format="bars", options=source).already == 2
        rows = sorted((one.prompt, one.first, one.source) for one in store.read())
        assert rows == [("p", "good", "outside"), ("q", "fine", "outside")]
        path.write_text("p|good|bad\nr|same|same\n", encoding="utf-8")
        with pytest.raises(BadRowsError, match="are equal") as raised:
            import_judgments(store, path, format="bars", options=source)
        assert [problem.line for problem in raised.value.problems] == [2]
        assert store.count() == 2


@pytest.mark.usefixtures("registered")
def test_a_name_is_registered_once() -> None:
    assert register_format(BARS) is BARS
    with pytest.raises(OptionError, match="registered already"):
        register_format(ImportFormat("bars", read_row))
    with pytest.raises(OptionError, match="registered already"):
        register_format(ImportFormat("jsonl", read_row))
