"""The schema layer: a JSON value is read as it is, or refused by the name of its field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, strategies as st

from ensemble_rm.errors import OptionError, SchemaError, StorageError
from ensemble_rm.saved_json import (
    MAX_DEPTH,
    at,
    from_row,
    get,
    parse_json,
    read_json,
    read_saved,
    reading,
)
from tests.support.json_values import ODD_VALUES, json_values, nodes, replaced


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"]
    size: float

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise OptionError(f"size must be > 0, not {self.size!r}")


@dataclass(frozen=True)
class Outer:
    count: int
    flag: bool
    name: str
    inner: Inner
    several: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "")
    table: Mapping[str, float | None] = field(default_factory=dict)
    note: str | None = None
    free: Any = None


INNER = st.builds(Inner, st.sampled_from(["a", "b"]), st.floats(1e-300, 1e300))
OUTER = st.builds(
    Outer,
    count=st.integers(),
    flag=st.booleans(),
    name=st.text(max_size=5),
    inner=INNER,
    several=st.lists(INNER, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.text(max_size=3)),
    table=st.dictionaries(
        st.text("xy", max_size=3), st.none() | st.floats(allow_nan=False, allow_infinity=False)
    ),
    note=st.none() | st.text(max_size=3),
    free=json_values(),
)


def as_json(value: object) -> Any:
    return json.loads(json.dumps(value))


@given(OUTER)
def test_what_was_written_is_read(outer: Outer) -> None:
    assert from_row(Outer, as_json(asdict(outer))) == outer


@given(OUTER, st.data())
def test_a_value_is_read_as_it_is_or_refused(outer: Outer, data: st.DataObject) -> None:
    row = as_json(asdict(outer))
    path = data.draw(st.sampled_from(list(nodes(row))))
    changed = replaced(row, path, data.draw(json_values() | st.sampled_from(ODD_VALUES)))
    try:
        read = from_row(Outer, changed)
    except SchemaError as error:
        # The field is the changed value's, or one inside or around it.
        place = [str(part) for part in path]
        named = error.field.split(".") if error.field else []
        assert named[: len(place)] == place[: len(named)] or path == ()
    else:
        # As text where anything may stand: NaN differs from itself.
        assert json.dumps(read.free) == json.dumps(changed.pop("free"))
        assert {**as_json(asdict(read)), "free": None} == changed | {"free": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 3.9}, r"^count: must be a whole number, not 3\.9$"),
        ({"count": True}, r"^count: must be a whole number, not True$"),
        ({"flag": "false"}, r"^flag: must be true or false, not 'false'$"),
        ({"flag": 1}, r"^flag: must be true or false, not 1$"),
        ({"name": None}, r"^name: must be text, not None$"),
        ({"inner": {"kind": "c", "size": 1}}, r"^inner\.kind: must be one of 'a', 'b', not 'c'$"),
        ({"inner": {"kind": "a", "size": math.nan}}, r"^inner\.size: must be a finite number"),
        ({"inner": {"kind": "a", "size": 10**400}}, r"^inner\.size: must be a finite number"),
        ({"inner": {"kind": "a", "size": -5}}, r"^inner: size must be > 0, not -5\.0$"),
        ({"inner": {"kind": "a"}}, r"^inner\.size: missing$"),
        ({"inner": []}, r"^inner: must be an object, not a list of 0$"),
        ({"several": [{"kind": "a", "size": "x"}]}, r"^several\.0\.size: .*not 'x'$"),
        ({"pair": [1]}, r"^pair: must have 2 entries, not a list of 1$"),
        ({"table": {"x": "y"}}, r"^table\.x: must be a finite number or null, not 'y'$"),
        ({"more": 1}, r"^more: unknown; the fields are count, flag"),
    ],
)
def test_the_message_names_field_and_value(change: dict[str, Any], message: str) -> None:
    row = {"count": 1, "flag": True, "name": "x", "inner": {"kind": "a", "size": 1}}
    assert from_row(Outer, row) == Outer(1, True, "x", Inner("a", 1.0))
    with pytest.raises(SchemaError, match=message):
        from_row(Outer, row | change)


@given(st.integers(1, 2 * MAX_DEPTH))
def test_depth_is_limited(depth: int) -> None:
    text = "[" * depth + "]" * depth
    if depth <= MAX_DEPTH:
        assert parse_json(text) == json.loads(text)
        return
    with pytest.raises(SchemaError, match="nested deeper than 100 levels"):
        parse_json(text)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff", b"9" * 5000),
        *(b"[" * 200_000, b'{"a":' * 200_000, b"[" * 200_000 + b"]" * 200_000),
    ],
)
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(SchemaError, match=r"x\.json: (not valid JSON|nested deeper).*backup"):
        read_json(path)


def test_an_error_names_the_file_once_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "inner.json"
    path.write_text('{"kind": "a", "size": -1}')
    with pytest.raises(SchemaError) as caught, reading(tmp_path / "other.json"), at("outer"):
        read_saved(Inner, path)
    assert str(caught.value) == (
        f"{path}: size must be > 0, not -1.0; restore the file from a backup, or save it again"
    )
    with pytest.raises(StorageError, match=r"absent\.json cannot be read: No such file"):
        read_json(tmp_path / "absent.json")


def test_a_field_of_an_object() -> None:
    row = {"a": 1, "b": None}
    assert (get(row, "a", float), get(row, "b", int | None), get(row, "c", int, 7)) == (
        1.0,
        None,
        7,
    )
    for name, kind, problem in (("a", str, "must be text, not 1"), ("c", int, "missing")):
        with pytest.raises(SchemaError, match=f"^{name}: {problem}$"):
            get(row, name, kind)


def test_a_former_name_is_read() -> None:
    assert from_row(Inner, {"type": "a", "size": 1}, former={"type": "kind"}) == Inner("a", 1.0)
