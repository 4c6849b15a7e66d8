"""``ensemble-rm``: its subcommands, its error handler, its exit codes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from ensemble_rm import __version__, errors
from ensemble_rm.cli.command import Command, Invocation, typer_command
from ensemble_rm.cli.console import Console
from ensemble_rm.cli.options import did_you_mean, write_config

# Subcommand modules are imported only when invoked, so that `--help` stays fast.
PANELS: dict[str, dict[str, str]] = {
    "Train": {
        "train": "train an ensemble on preference pairs",
        "combine": "combine existing reward models into one ensemble",
        "average-weights": "average the members' weights into one model",
    },
    "Score": {
        "score": "score samples",
        "compare": "compare pairs of completions",
        "rank": "rank the completions of each prompt",
        "serve": "serve rewards over HTTP",
        "remote": "save a reward model behind HTTP as a member",
    },
    "Judge": {
        "judgments": "import, export, back up and report on human judgments",
        "select": "pick the unjudged pairs that a human should judge",
        "route": "compare pairs, and ask a judge about the uncertain ones",
    },
    "Calibrate and monitor": {
        "calibrate": "fit the temperature on held-out judgments",
        "evaluate": "measure an ensemble on judged pairs",
        "precision": "compare scores in a lower precision with float32",
        "recalibrate": "fit on fresh judgments, publish if better",
        "retrain": "train the members on new judgments, publish if better",
        "drift": "check for drift since the current version",
        "verify": "check the saved files against their digests",
        "versions": "list, show, pin, roll back and repair versions",
    },
    "RL": {
        "init-reward": "write an RL loop's reward file",
        "make-pairs": "make DPO pairs from several samples per prompt",
    },
    "Start": {"demo": "train, calibrate and evaluate on the packaged data"},
}
GROUPS: dict[str, dict[str, str]] = {
    "judgments": {
        "import": "add a file's judgments; a repeated import adds nothing",
        "export": "write judgments as JSONL or as a data set",
        "report": "report annotator agreement, ties and position bias",
        "backup": "copy a store while it is in use",
        "repair": "migrate and check a store, and restore missing triggers",
        "retract": "take judgments back",
        "erase": "erase judgments' texts and what was derived from them",
    },
    "versions": {
        "list": "list the versions and mark the current one",
        "show": "show a version and what it was fitted on",
        "rollback": "go back to an earlier version",
        "pin": "make a version current and keep jobs from changing it",
        "unpin": "let jobs publish again",
        "withdraw-run": "take a job's run out of account",
        "repair": "remove leftovers of killed jobs",
    },
}

RENAMED = {
    "merge": "average-weights",
    "pin": "versions pin",
    "rollback": "versions rollback",
    "show": "versions show",
    "unpin": "versions unpin",
}
RENAMED_OPTIONS: dict[str, dict[str, str]] = {
    "drift": {"--looks": "--checks"},
    "remote": {"--self-test": "--raw-logit-check", "--token-env": "--token HOST=ENV"},
    "route": {"--token-env": "--token HOST=ENV"},
    "serve": {"--window-ms": "--window-seconds, in seconds"},
}

EXIT_CODES = """\
exit codes:

0    done
2    an option or argument cannot be used
3    the data cannot be read or used
4    a model, a saved ensemble or a cache cannot be read or written
5    the judgments do not allow a calibration, or it does not apply
6    training or scoring met NaN or infinity, or cannot be resumed
7    the server of a member or judge failed, or gave no usable response
10   a job kept the published version and reports the reason
11   a job has too few judgments
12   a job found drift that recalibration does not fix
13   another job is running on the folder
14   saved files changed, or versions exist that the pointer does not know
15   a judgment store lost or changed judgments
130  interrupted"""

_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.DataError, 3),
    (errors.DigestMismatchError, 14),
    (errors.ModelError, 4),
    # The first match counts, so a subclass stands before its base.
    (errors.LockedError, 13),
    (errors.UnknownVersionsError, 14),
    (errors.StoreIntegrityError, 15),
    (errors.StorageError, 4),
    (errors.MissingExtraError, 4),
    (errors.CalibrationError, 5),
    (errors.TrainingError, 6),
    (errors.ScoringError, 6),
    (errors.RemoteError, 7),
    (errors.OptionError, 2),
    (errors.EnsembleRMError, 2),
    (FileNotFoundError, 3),
    (OSError, 4),
)


def _version(value: bool) -> None:
    if value:
        print(f"ensemble-rm {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Robust, calibrated rewards from ensembles of reward models."""


def _listed() -> None:
    """Serve as a placeholder in the list; `_Subcommands` replaces it when it is invoked."""


class _Subcommands(TyperGroup):
    """Loads a listed subcommand, with its options, when it is invoked."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        group = "" if ctx.parent is None else f"{self.name} "
        word = args[0]
        if not group and word in RENAMED:
            ctx.fail(f"{word!r} is now 'ensemble-rm {RENAMED[word]}'")
        if group == "versions " and word not in self.commands and not word.startswith("-"):
            ctx.fail(
                f"no command {word!r}{did_you_mean(word, list(self.commands))}; "
                f"'ensemble-rm versions list {word}' lists the versions of a run"
            )
        name, command, rest = super().resolve_command(ctx, args)
        if name in GROUPS and not group:
            return name, command, rest
        return name, load_command(f"{group}{name}"), rest


def load_command(name: str) -> Any:
    """Return the Typer command of a subcommand, such as ``"versions list"``."""
    kind = find_command(name)
    return typer_command(name, kind, f"example:\n{kind.example}\n\n{EXIT_CODES}")


def find_command(name: str) -> type[Command]:
    """Return the class of a subcommand, such as ``"versions list"``."""
    first, last = name.split(maxsplit=1)[0], name.rsplit(maxsplit=1)[-1]
    module = import_module(f"ensemble_rm.cli.{first.replace('-', '_')}")
    kind: type[Command] = getattr(module, "".join(part.title() for part in last.split("-")))
    return kind


def command_names() -> list[str]:
    """Return the name of every subcommand, with its group where it has one."""
    names = [name for panel in PANELS.values() for name in panel if name not in GROUPS]
    return names + [f"{group} {name}" for group, below in GROUPS.items() for name in below]


def make_app(words: Sequence[str] = ()) -> typer.Typer:
    """Return the Typer application with every subcommand's name, help and panel.

    Parameters
    ----------
    words : sequence of str
        The command line. Groups get no options of their own: Typer would read them with pydantic,
        which takes longer than the rest of ``--help``.
    """

    def settings(depth: int) -> dict[str, Any]:
        ends_here = len(words) <= depth or words[depth].startswith("-")
        return {
            "cls": _Subcommands,
            "no_args_is_help": True,
            "rich_markup_mode": "rich",
            "add_help_option": ends_here,
            "add_completion": ends_here,
        }

    app = typer.Typer(epilog=EXIT_CODES, **settings(0))
    app.callback()(_top if not words or words[0].startswith("-") else _listed)

    for panel, commands in PANELS.items():
        for name, text in commands.items():
            if name not in GROUPS:
                app.command(name, help=text, rich_help_panel=panel)(_listed)
                continue
            group = typer.Typer(help=text, **settings(1))
            for below, what in GROUPS[name].items():
                group.command(below, help=what)(_listed)
            app.add_typer(group, name=name, rich_help_panel=panel)
    return app


def parse(arguments: Sequence[str]) -> Invocation | int:
    """Read a command line without running it.

    Parameters
    ----------
    arguments : sequence of str
        Without the program's name.

    Returns
    -------
    Invocation or int
        The subcommand with its options; the exit code where help was asked for.

    Raises
    ------
    OptionError
        If an option is unknown, missing, or has a bad value.
    """
    words = list(arguments)
    for word in words[1:]:
        flag = word.partition("=")[0]
        if new := RENAMED_OPTIONS.get(words[0], {}).get(flag):
            raise errors.OptionError(f"{flag} is now {new}")
    command = typer.main.get_command(make_app(words))
    try:
        result = command.main(words, prog_name="ensemble-rm", standalone_mode=False)
    except TyperException as error:
        message = error.format_message().strip()
        if not message:  # the help was printed, since no subcommand was given
            return error.exit_code
        raise errors.OptionError(_one_line(message)) from None
    return result if isinstance(result, Invocation) else int(result or 0)


def _one_line(message: str) -> str:
    text = " ".join(message.split()).rstrip(".")
    text = re.sub(r" \(Possible options: ([^,)]+)[^)]*\)", r"; did you mean \1?", text)
    return text[:1].lower() + text[1:]


def exit_code(error: BaseException) -> int:
    """Return the exit code of an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The process's own where not given.

    Returns
    -------
    int
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    name, as_json = _name(words), "--json" in words
    if as_json or not sys.stderr.isatty():
        # Progress bars of other libraries would fill log files with control characters.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Tokenizers warn, and may deadlock, where a process forks after using threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers warns about newly initialised heads, which training creates on purpose.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        invocation = parse(words)
        if isinstance(invocation, int):
            return invocation
        console = Console(invocation.name, json=invocation.json)
        code = invocation.command.run(console)
        console.finish(_save_config(console, invocation))
    except KeyboardInterrupt:
        print("ensemble-rm: interrupted", file=sys.stderr)
        # 128 + SIGINT, as shells report it.
        return 130
    except BrokenPipeError:
        # The reader, such as `| head`, has what it wants; with stderr closed, the interpreter
        # does not report the failed flush at exit.
        sys.stderr.close()
        return 0
    except (errors.EnsembleRMError, OSError) as error:
        code = exit_code(error)
        # A script that reads standard output gets the error there too.
        if as_json:
            described = {"error": type(error).__name__, "message": str(error), "exit_code": code}
            print(json.dumps(described, ensure_ascii=False))
        help_hint = f"; see ensemble-rm {name} --help".replace("  ", " ")
        # Only a missing option is answered by the help; other errors carry their own remedy.
        hint = help_hint if str(error).startswith("missing ") else ""
        print(f"ensemble-rm {name}".rstrip() + f": {error}{hint}", file=sys.stderr)
        return code
    return code or 0


def _name(words: Sequence[str]) -> str:
    """Return the subcommand that a command line names."""
    if not words or words[0].startswith("-"):
        return ""
    below = GROUPS.get(words[0], {})
    return " ".join(words[:2]) if len(words) > 1 and words[1] in below else words[0]


def _save_config(console: Console, invocation: Invocation) -> Path | None:
    """Write the command's options next to its result; return the file, None without a result."""
    if console.saved is None:
        return None
    command = invocation.name.replace(" ", "-")
    path = console.saved.with_name(f"{console.saved.absolute().name}.{command}.yaml")
    try:
        write_config(path, invocation.name, invocation.command)
    except OSError as error:  # not a failure: the result itself is saved
        console.note(f"{path} cannot be written: {error}")
        return None
    return path
