"""JSON values to put where they do not belong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

from hypothesis import strategies as st

Path: TypeAlias = tuple[str | int, ...]

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]

ODD_VALUES: list[Any] = [
    *(-5, -1, 0, 0.0, 1, 2, 3, 3.9, 1e-320, 1e308, 10**400, math.nan, math.inf, -math.inf),
    *(True, False, None, "", "false", "nan", "..", "../..", "/etc", "a/../../b", "C:\\x", "a\0b"),
    *([], {}, [[]], [None], {"": None}, DEEP),
]


def json_values() -> st.SearchStrategy[Any]:
    """Return any small JSON value of finite numbers."""
    leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    leaves |= st.floats(allow_nan=False, allow_infinity=False)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    )


def nodes(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of every value in a JSON value, the value itself first."""
    yield path
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(item, (*path, name))


def replaced(value: Any, path: Path, new: Any) -> Any:
    """Return a copy with another value at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy
