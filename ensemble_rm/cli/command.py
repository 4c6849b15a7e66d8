"""A subcommand: a frozen dataclass of its options, and what it does with them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

import typer

from ensemble_rm.cli.options import Leaf, build, element_type, leaves, read_config
from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


class Command(ABC):
    """A subcommand. Its class is a frozen dataclass; its docstring is the help text."""

    example: ClassVar[str]

    @abstractmethod
    def run(self, console: Console) -> int | None:
        """Run the command; return the exit code, None for 0."""


@dataclass(frozen=True)
class Invocation:
    """A subcommand with its options, as read from the command line and a file of ``--config``.

    Attributes
    ----------
    name : str
        Such as ``versions list``.
    command : Command
    json : bool
        Whether the result is printed as JSON.
    """

    name: str
    command: Command
    json: bool


def typer_command(name: str, kind: type[Command], epilog: str) -> Any:
    """Return the Typer command that reads a subcommand's options, and returns its `Invocation`."""
    options = leaves(kind)

    def read(**given: Any) -> Invocation:
        path: Path | None = given.pop("config")
        as_json = bool(given.pop("json"))
        values = {} if path is None else read_config(Path(path))
        for leaf in options:
            if not leaf.metadata.get("from_file", True) and _has(values, leaf.path):
                raise OptionError(f"--config {path}: {leaf.flag} is for the command line alone")
            # The command line wins over the file; an option that is not given leaves the file's.
            if (value := given["__".join(leaf.path)]) is not None:
                _put(values, leaf.path, value)
        return Invocation(name, build(kind, values), as_json)

    parameters = [("__".join(leaf.path), _annotation(leaf)) for leaf in options]
    parameters += [
        ("config", Annotated[Path, _file("--config", "YAML or JSON file of these options")]),
        ("json", Annotated[bool, _flag("--json", "print the result as one JSON object")]),
    ]
    # Typer reads options from a function's signature, so one is built from the dataclass.
    keyword = inspect.Parameter.KEYWORD_ONLY
    read.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, keyword, default=None, annotation=a) for n, a in parameters]
    )
    read.__annotations__ = dict(parameters)
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    last = name.rpartition(" ")[2]
    # Rich keeps line breaks; joined lines let it wrap a paragraph to the terminal's width.
    paragraphs = (inspect.getdoc(kind) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(last, help=_escaped(text), epilog=_escaped(epilog))(read)
    return typer.main.get_command(app)


def _has(values: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for name in path[:-1]:
        below = values.get(name)
        # A copy: the file's mapping stays as it was read.
        values[name] = dict(below) if isinstance(below, Mapping) else {}
        values = values[name]
    values[path[-1]] = value


def _file(flag: str, text: str) -> Any:
    return typer.Option(
        flag, parser=_as_text, metavar="FILE", help=f"{text} (default: none)", show_default=False
    )


def _flag(flag: str, text: str) -> Any:
    return typer.Option(flag, help=f"{text} (default: no)", show_default=False)


def _as_text(text: str) -> str:
    # Typer passes text: `options.convert` reads values of the command line and of files alike.
    return text


def _annotation(leaf: Leaf) -> Any:
    kind = _shown_type(leaf)
    given: dict[str, Any] = {
        "help": _escaped(leaf.help),
        "show_default": False,
        "rich_help_panel": leaf.metadata.get("panel"),
        "metavar": leaf.flag if leaf.is_argument else leaf.metadata.get("metavar"),
    }
    if leaf.is_argument:
        return Annotated[kind, typer.Argument(parser=_as_text, **given)]
    # An option that is on by default needs a form that turns it off.
    if kind is bool:
        negative = f"/--no-{leaf.flag[2:]}" if leaf.default is True else ""
        return Annotated[kind, typer.Option(leaf.flag + negative, **given)]
    return Annotated[kind, typer.Option(leaf.flag, parser=_as_text, **given)]


def _shown_type(leaf: Leaf) -> Any:
    """Return the type that Typer shows and completes; it does not convert."""
    kind = element_type(leaf.type)
    if leaf.choices:
        kind = Literal[leaf.choices]
    elif "parse" in leaf.metadata or kind not in (bool, int, float, Path):
        kind = str
    if get_origin(leaf.type) is tuple:
        arguments = get_args(leaf.type)
        repeated = arguments[-1] is Ellipsis
        return list[kind] if repeated else tuple[(kind,) * len(arguments)]  # type: ignore[valid-type,misc]
    return list[str] if element_type(leaf.type) is not leaf.type else kind


def _escaped(text: str) -> str:
    """Keep rich from reading ``[NAME=]`` as markup."""
    return text.replace("[", r"\[")
