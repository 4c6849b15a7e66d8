"""Command-line options, derived from the dataclasses that they fill.

A command is a frozen dataclass. Each field is an option, with its type, its default and, in the
field's metadata, its help text. A field whose type is another dataclass, such as the library's
`RecalibrationOptions`, adds the options of that dataclass. So every default is defined once, where
the library uses it. The same dataclass reads and writes the files of ``--config``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import date, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ensemble_rm.errors import OptionError

T = TypeVar("T")
_BOOLS = {"true": True, "yes": True, "false": False, "no": False}


def option(help: str, *, default: Any = MISSING, **metadata: Any) -> Any:  # noqa: A002
    """Return a dataclass field that is an option.

    Parameters
    ----------
    help : str
        A noun phrase; the default is added to it.
    default : object
        A field without one is required.
    **metadata
        ``flag``: the option's name where it is not the field's; ``metavar``; ``panel``: heading in
        the help; ``choices``: the allowed texts; ``shown``: the default in words, where its value
        is not helpful; ``parse``: callable from text to value; ``argument``: positional;
        ``from_file``: False where a file of ``--config`` may not set it.
    """
    return dataclasses.field(default=default, metadata={"help": help} | metadata)


def argument(help: str, *, default: Any = MISSING, **metadata: Any) -> Any:  # noqa: A002
    """Return a dataclass field that is a positional argument."""
    return option(help, default=default, argument=True, **metadata)


def nested(kind: type, *, panel: str | None = None, **leaves: Any) -> Any:
    """Return a dataclass field whose options are those of another dataclass.

    Parameters
    ----------
    kind : type
    panel : str, optional
        Heading of its options in the help.
    **leaves
        For fields of `kind` by name: metadata that replaces its own; None leaves the field out.
    """
    metadata = {"kind": kind, "panel": panel, "leaves": leaves}
    # With a required option inside, the group itself has no default to be made from.
    if any(f.default is MISSING and f.default_factory is MISSING for f in fields(kind)):
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=kind, metadata=metadata)


@dataclass(frozen=True)
class Leaf:
    """One option of a command.

    Attributes
    ----------
    path : tuple of str
        The field, from the command's dataclass down.
    type : type
        Without None.
    optional : bool
        Whether None is a value.
    default : object
        MISSING where the option is required.
    metadata : mapping
        See `option`.
    """

    path: tuple[str, ...]
    type: Any
    optional: bool
    default: Any
    metadata: Mapping[str, Any]

    @property
    def is_argument(self) -> bool:
        """Whether it is positional."""
        return bool(self.metadata.get("argument"))

    @property
    def flag(self) -> str:
        """The option as it is typed, or the argument as it is shown."""
        if self.is_argument:
            return str(self.metadata.get("metavar") or self.path[-1].upper())
        return "--" + str(self.metadata.get("flag") or self.path[-1].replace("_", "-"))

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed texts; none where every text is allowed."""
        given = self.metadata.get("choices", ())
        kind = element_type(self.type)
        return get_args(kind) if get_origin(kind) is Literal else tuple(given)

    @property
    def help(self) -> str:
        """The help text, with the default."""
        text = str(self.metadata.get("help", "")).rstrip(".")
        if self.default is MISSING:
            return f"{text} (required)"
        if "(default:" in text:
            return text
        return f"{text} (default: {self.metadata.get('shown') or shown(self.default)})"


def element_type(kind: Any) -> Any:
    """Return the type of a tuple's elements or of a mapping's values; of others, the type."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        return arguments[0]
    return arguments[1] if _is_mapping(kind) else kind


def shown(value: Any) -> str:
    """Return a default in words."""
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def leaves(command: type) -> list[Leaf]:
    """Return every option of a command's dataclass, in the order of its fields."""
    return list(_leaves(command, MISSING, (), None, {}))


def _leaves(
    kind: type, default: Any, path: tuple[str, ...], panel: str | None, change: Mapping[str, Any]
) -> Iterator[Leaf]:
    for field in fields(kind):
        if not field.init or (field.name in change and change[field.name] is None):
            continue
        metadata = dict(field.metadata) | dict(change.get(field.name, {}))
        # The default of a nested field comes from the outer default, which may differ from its own.
        value = getattr(default, field.name) if is_dataclass(default) else _default(field)
        inner, optional = without_none(metadata.get("kind") or field_type(kind, field.name))
        here = (*path, field.name)
        if is_dataclass(inner) and "parse" not in metadata:
            assert isinstance(inner, type)
            below = metadata.get("panel") or panel
            yield from _leaves(inner, value, here, below, metadata.get("leaves", {}))
        else:
            metadata["panel"] = metadata.get("panel") or panel
            yield Leaf(here, inner, optional, value, metadata)


def field_type(kind: type, name: str) -> Any:
    """Return the type of one field.

    Only its annotation is read: another one may name a class that is imported for types alone.
    """
    for owner in kind.__mro__:
        if name in (annotations := vars(owner).get("__annotations__", {})):
            module = vars(sys.modules[owner.__module__])
            shim = type("Shim", (), {"__annotations__": {name: annotations[name]}})
            return get_type_hints(shim, globalns=module)[name]
    raise LookupError(f"{kind.__name__} has no field {name!r}")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return MISSING if field.default_factory is MISSING else field.default_factory()


def without_none(kind: Any) -> tuple[Any, bool]:
    """Return a type without None, and whether None was in it."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    rest = [part for part in get_args(kind) if part is not types.NoneType]
    optional = len(rest) < len(get_args(kind))
    # Of a number or a tuple of numbers the tuple is taken: it reads both.
    several = [part for part in rest if get_origin(part) is tuple]
    # A Hub id stays text, since Path would turn "./x" into "x".
    return (several or [part for part in rest if part is str] or rest)[0], optional


def build(command: type[T], values: Mapping[str, Any]) -> T:
    """Return a command's dataclass from nested values, as YAML and JSON have them, or as text.

    Raises
    ------
    OptionError
        If a name is unknown, a value cannot be read, or a required one is missing.
    """
    result: T = _build(command, values, leaves(command), ())
    return result


def _build(
    kind: type, values: Mapping[str, Any], options: Sequence[Leaf], path: tuple[str, ...]
) -> Any:
    by_path = {leaf.path: leaf for leaf in options}
    groups = {leaf.path[len(path)] for leaf in options if len(leaf.path) > len(path) + 1}
    names = [leaf.path[len(path)] for leaf in options]
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            where = ".".join((*path, str(name)))
            raise OptionError(f"unknown setting {where!r}{did_you_mean(str(name), names)}")
        if name not in groups:
            built[name] = convert(by_path[(*path, name)], value)
    for field in fields(kind):
        below = [leaf for leaf in options if leaf.path[len(path)] == field.name]
        given = values.get(field.name)
        if field.name in groups:
            if not isinstance(given or {}, Mapping):
                raise OptionError(f"{field.name}: {given!r} must be a mapping of settings")
            inner = field.metadata.get("kind") or without_none(field_type(kind, field.name))[0]
            depth = len(path) + 1
            own = [leaf for leaf in below if len(leaf.path) > depth]
            built[field.name] = _build(inner, given or {}, own, (*path, field.name))
        elif below and field.name not in {*groups, *built} and below[0].default is MISSING:
            what = "argument" if below[0].is_argument else "option"
            raise OptionError(f"missing {what} {below[0].flag}")
    return kind(**built)


def convert(leaf: Leaf, value: Any) -> Any:
    """Return an option's value from text, or from a value of YAML or JSON.

    Raises
    ------
    OptionError
        If it cannot be read as the option's type.
    """
    if value is None or (leaf.optional and value == "none"):
        if leaf.optional:
            return None
        raise OptionError(f"{leaf.flag}: a value is needed")
    try:
        if parse := leaf.metadata.get("parse"):
            return parse(str(value))
        metavar = leaf.metadata.get("metavar", "NAME=VALUE")
        return _convert(leaf.type, value, leaf.choices, metavar)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{leaf.flag}: {error}") from None


def _convert(kind: Any, value: Any, choices: Sequence[str], metavar: str = "") -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        values = _items(value, element_type(kind))
        if arguments[-1] is not Ellipsis and len(values) != len(arguments):
            raise ValueError(f"{len(arguments)} values are needed, not {len(values)}")
        return tuple(_convert(arguments[0], item, choices) for item in values)
    if _is_mapping(kind):
        pairs = (
            value.items()
            if isinstance(value, Mapping)
            else map(_pair(kind, metavar), _items(value))
        )
        return {str(key): _convert(element_type(kind), item, choices) for key, item in pairs}
    if origin is Literal or choices:
        return _choice(value, choices)
    return _scalar(kind, value)


def _items(value: Any, kind: Any = str) -> list[Any]:
    """Return a list's items; numbers may also be separated by commas."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if kind not in (int, float):
        return items
    return [x for item in items for x in (item.split(",") if isinstance(item, str) else [item])]


def _pair(kind: Any, metavar: str) -> Callable[[Any], tuple[str, str]]:
    # A JSON value may hold "=", and so may a label's name; numbers and outcomes never do.
    split = str.partition if element_type(kind) is Any else str.rpartition

    def read(text: Any) -> tuple[str, str]:
        name, equals, value = split(str(text), "=")
        if not equals:
            raise ValueError(f"needs {metavar}, not {text!r}")
        return name, value

    return read


def _choice(value: Any, choices: Sequence[str]) -> str:
    # A near miss gets the one suggestion; the full list only helps where nothing is near.
    if value not in choices:
        hint = did_you_mean(str(value), choices) or f"; choose from {', '.join(choices)}"
        raise ValueError(f"{value!r} is not known{hint}")
    return str(value)


def _scalar(kind: Any, value: Any) -> Any:
    if kind is Any:
        return _json(value) if isinstance(value, str) else value
    if kind is bool:
        value = _BOOLS.get(value.lower(), value) if isinstance(value, str) else value
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not yes or no")
        return value
    if kind in (int, float):
        return _number(kind, value)
    if kind is datetime:
        return read_time(value)
    if not isinstance(value, str | Path):
        raise TypeError(f"{value!r} is not text")
    return Path(value) if kind is Path else str(value)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text!r} is not JSON ({error})") from None


def _number(kind: type[int] | type[float], value: Any) -> int | float:
    """Read a number; a fraction is not a whole number, and true is neither."""
    # YAML reads `yes` as true, and int(True) is 1.
    wrong = isinstance(value, bool) or (kind is int and isinstance(value, float) and value % 1)
    try:
        return kind("" if wrong else value)
    except (TypeError, ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{value!r} is not {what}") from None


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def did_you_mean(value: str, known: Sequence[str]) -> str:
    """Return a suggestion for a misspelt value; empty if nothing resembles it."""
    close = get_close_matches(value, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def read_time(value: Any) -> datetime:
    """Read an ISO 8601 date or time, in UTC if it has no offset."""
    from ensemble_rm.errors import DataError
    from ensemble_rm.judgments.judgment import parse_time

    try:
        text = value.isoformat() if isinstance(value, date) else str(value)
        return parse_time(text, assume_utc=True)
    except DataError as error:
        raise ValueError(str(error)) from None


def read_days(text: str) -> float:
    """Read ``180d`` or ``180``."""
    try:
        days = float(text.strip().removesuffix("d"))
    except ValueError:
        days = math.nan
    # NaN fails both comparisons, so text that is no number ends here too.
    if not 0 < days < math.inf:
        raise ValueError(f"{text!r} is not a number of days, such as 180d")
    return days


def settings(config: Any) -> dict[str, Any]:
    """Return a command's options as `build` reads them back: nested, of YAML's and JSON's types."""
    result: dict[str, Any] = {}
    for leaf in leaves(type(config)):
        if not leaf.metadata.get("from_file", True):
            continue
        values, value = result, config
        for name in leaf.path[:-1]:
            value = getattr(value, name)
            values = values.setdefault(name, {})
        values[leaf.path[-1]] = _plain(getattr(value, leaf.path[-1]))
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def read_config(path: Path) -> dict[str, Any]:
    """Read a file of ``--config``, YAML or JSON.

    Raises
    ------
    OptionError
        If it cannot be read, or is not a mapping.
    """
    import yaml

    try:
        # JSON is valid YAML, except for tabs in its indentation.
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OptionError(f"--config {path} is not valid YAML or JSON: {error}") from None
    if not isinstance(values, dict):
        raise OptionError(f"--config {path} must hold a mapping of settings")
    return values


def write_config(path: Path, command: str, config: Any) -> None:
    """Write a command's options as a file for ``--config``."""
    import yaml

    head = f"# ensemble-rm {command} --config {path.name}\n"
    text = yaml.safe_dump(settings(config), sort_keys=False, allow_unicode=True)
    path.write_text(head + text, encoding="utf-8")
