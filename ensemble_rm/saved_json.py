"""Read the JSON files that this package saves, each value checked against its type.

One layer for every such file: a dataclass is the schema of an object, its annotations are the
types, and its ``__post_init__`` checks the domain. Anything else in the file is a `SchemaError`
that names the field and the value. Strict where ``cls(**row)`` is not: ``True`` is no number, 3.9
is no version number, ``"false"`` is no flag, NaN is no score.

Written here because no dependency of the package does this for plain dataclasses: pydantic belongs
to the server's extra, and importing it takes longer than importing this package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ensemble_rm.errors import OptionError, SchemaError, StorageError

T = TypeVar("T")

MAX_DEPTH = 100
"""Deepest nesting of a file; the parser's own limit depends on the caller's stack."""

_REMEDY = "restore the file from a backup, or save it again"
_NAMES = {float: "a finite number", int: "a whole number", bool: "true or false", str: "text"}
_SHOWN = 80  # characters of a value that a message quotes


# Files -----------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    StorageError
        If it cannot be read.
    SchemaError
        If it is not valid JSON, or nested deeper than `MAX_DEPTH`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    with reading(path):
        return parse_json(data)


def read_saved(kind: type[T], path: Path) -> T:
    """Read a JSON file whose content is an object of a dataclass.

    Raises
    ------
    StorageError, SchemaError
        See `read_json` and `from_row`.
    """
    with reading(path):
        return from_row(kind, read_json(path))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises
    ------
    SchemaError
        If it is not valid JSON, or nested deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        raise SchemaError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # also of invalid UTF-8, and of an integer of 4,300 digits
        raise SchemaError(f"not valid JSON ({error})") from None
    # A depth that the parser accepts here could still fail where the value is saved again.
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = [x.values() if isinstance(x, dict) else x for x in level]
        level = [y for x in inner if not isinstance(x, _LEAVES) for y in x]
        if not level:
            return value
    raise SchemaError(f"nested deeper than {MAX_DEPTH} levels")


_LEAVES = (str, int, float, NoneType)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Add the file and the remedy to the errors of what is read in this block."""
    try:
        yield
    except SchemaError as error:
        if error.file is not None:
            raise
        raise SchemaError(error.problem, field=error.field, file=path, remedy=_REMEDY) from error


@contextmanager
def at(*names: str | int) -> Iterator[None]:
    """Add the names of fields to the errors of what is read in this block.

    An `OptionError` of a constructor becomes a `SchemaError`, and so do Python's own errors of
    code that meets another type than it expects.
    """
    try:
        yield
    except SchemaError as error:
        if error.file is not None:
            raise
        field = ".".join(filter(None, (*map(str, names), error.field)))
        raise SchemaError(error.problem, field=field) from error
    except OptionError as error:
        raise SchemaError(str(error), field=".".join(map(str, names))) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SchemaError(f"unusable ({error!r})", field=".".join(map(str, names))) from error


# Values ----------------------------------------------------------------------------------------


def as_object(value: Any) -> dict[str, Any]:
    """Return a JSON object as it is.

    Raises
    ------
    SchemaError
        If the value is something else.
    """
    if not isinstance(value, Mapping):
        raise SchemaError(f"must be an object, not {_shown(value)}")
    return dict(value)


def get(row: Mapping[str, Any], name: str, kind: Any, *default: Any) -> Any:
    """Return a field of a JSON object as a type; see `convert`.

    Parameters
    ----------
    row : mapping
    name : str
    kind : type
    *default
        What a missing field gives; without it, such a field is an error.

    Raises
    ------
    SchemaError
        If the field is missing, or of another type.
    """
    if name not in row and default:
        return default[0]
    with at(name):
        if name not in row:
            raise SchemaError("missing")
        return convert(kind, row[name])


def from_row(kind: type[T], row: Any, *, former: Mapping[str, str] | None = None) -> T:
    """Build a dataclass from a JSON object with its fields.

    Parameters
    ----------
    kind : type
        A dataclass; fields without a default must be in the object.
    row : JSON value
    former : mapping of str to str, optional
        The present name of a field by the name that older files have.

    Raises
    ------
    SchemaError
        If it is no object, a field is missing, unknown or of another type, or the class refuses
        its value.
    """
    values = as_object(row)
    for old, new in (former or {}).items():
        if old in values and new not in values:
            values[new] = values.pop(old)
    schema = _schema(cast("Hashable", kind))
    if unknown := [name for name in values if name not in schema]:
        raise SchemaError(f"unknown; the fields are {', '.join(schema)}", field=str(unknown[0]))
    built = {}
    for name, (annotation, required) in schema.items():
        if name in values:
            with at(name):
                built[name] = convert(annotation, values[name])
        elif required:
            raise SchemaError("missing", field=name)
    with at():
        return kind(**built)


def convert(kind: Any, value: Any) -> Any:
    """Return a JSON value as a type: lists as tuples, objects as dataclasses.

    Parameters
    ----------
    kind : type
        ``bool``, ``int``, ``float``, ``str``, None, ``Any``, a dataclass, or a literal, union,
        tuple, sequence, set or mapping of them.
    value : JSON value

    Raises
    ------
    SchemaError
        If it is of another type; a number must be finite.
    """
    if kind is Any:
        return value
    if kind is None or kind is NoneType:
        return _require(value is None, None, "null", value)
    if kind in _NAMES:
        return _scalar(kind, value)
    if is_dataclass(kind) and isinstance(kind, type):
        # One that is built already comes from a reader that knows older files.
        return value if isinstance(value, kind) else from_row(kind, value)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        known = any(type(value) is type(choice) and value == choice for choice in arguments)
        return _require(known, value, f"one of {', '.join(map(repr, arguments))}", value)
    if origin in (Union, UnionType):
        return _union(arguments, value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: _inner(arguments[1], name, item) for name, item in as_object(value).items()}
    if isinstance(origin, type) and issubclass(origin, Sequence | Set):
        return _sequence(origin, arguments, value)
    raise TypeError(f"no JSON value has the type {kind!r}")


def _scalar(kind: Any, value: Any) -> Any:
    if kind in (bool, str):
        return _require(isinstance(value, kind), value, _NAMES[kind], value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return _require(number and isinstance(value, int), value, _NAMES[int], value)
    try:
        result = float(value) if number else math.nan
    except OverflowError:  # an integer of more than 308 digits
        result = math.inf
    return _require(math.isfinite(result), result, _NAMES[float], value)


def _union(kinds: Sequence[Any], value: Any) -> Any:
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    for kind in others[:-1]:
        try:
            return convert(kind, value)
        except SchemaError:
            continue
    try:
        return convert(others[-1], value)
    except SchemaError as error:
        # The field of an object inside it, if the problem is there.
        if error.field or not all(kind in _NAMES for kind in others):
            raise
        names = [_NAMES[kind] for kind in others] + ["null"] * (NoneType in kinds)
        raise SchemaError(f"must be {' or '.join(names)}, not {_shown(value)}") from None


def _sequence(origin: type, arguments: Sequence[Any], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise SchemaError(f"must be a list, not {_shown(value)}")
    if origin is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise SchemaError(f"must have {len(arguments)} entries, not {_shown(value)}")
        return tuple(_inner(kind, i, x) for i, (kind, x) in enumerate(zip(arguments, value)))  # noqa: B905 - lengths are equal
    items = [_inner(arguments[0], i, item) for i, item in enumerate(value)]
    return frozenset(items) if issubclass(origin, Set) else tuple(items)


def _inner(kind: Any, name: str | int, value: Any) -> Any:
    try:  # not `at`: a list may have a million entries
        return convert(kind, value)
    except SchemaError as error:
        field = ".".join(filter(None, (str(name), error.field)))
        raise SchemaError(error.problem, field=field) from None


def _require(ok: bool, result: Any, wanted: str, value: Any) -> Any:
    if not ok:
        raise SchemaError(f"must be {wanted}, not {_shown(value)}")
    return result


def _shown(value: Any) -> str:
    # Only the outermost level: the representation of deep lists recurses.
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_SHOWN:
        return "a whole number of more digits than can be used"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


@lru_cache(maxsize=256)
def _schema(kind: type[Any]) -> dict[str, tuple[Any, bool]]:
    """Return a dataclass's fields: the type of each, and whether a row must have it."""
    hints = get_type_hints(kind)
    return {
        field.name: (
            hints[field.name],
            field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(kind)
        if field.init
    }
