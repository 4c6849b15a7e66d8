"""Help texts of dataclass fields, stated once for docstrings, command line and config files."""

from __future__ import annotations

import textwrap
from dataclasses import Field, fields
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")


def with_field_help(cls: type[T]) -> type[T]:
    """Append a dataclass's fields to its docstring, each with its help text.

    A field's help stands in its metadata: ``field(default=5, metadata={"help": "…"})``. A subclass
    that only changes a default, ``epochs: int = 4``, inherits the help text of the field that it
    replaces.

    Parameters
    ----------
    cls : type
        A dataclass.

    Returns
    -------
    type
        The same class.

    Raises
    ------
    TypeError
        If a field has no help text.
    """
    lines = ["Attributes", "----------"]
    for own in fields(cls):  # type: ignore[arg-type]
        text = _help(cls, own)
        own.metadata = MappingProxyType({**own.metadata, "help": text})
        sentence = text[0].upper() + text[1:]
        lines += [
            f"{own.name} : {own.type}",
            *_wrapped(sentence if text.endswith(".") else sentence + "."),
        ]
    cls.__doc__ = f"{textwrap.dedent(cls.__doc__ or '').strip()}\n\n" + "\n".join(lines) + "\n"
    return cls


def _help(cls: type[Any], own: Field[Any]) -> str:
    for ancestor in cls.__mro__:
        known = vars(ancestor).get("__dataclass_fields__", {}).get(own.name)
        if known is not None and "help" in known.metadata:
            return str(known.metadata["help"])
    raise TypeError(f"field {own.name!r} of {cls.__name__} has no help text in its metadata")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 96, initial_indent="    ", subsequent_indent="    ")
