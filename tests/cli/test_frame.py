"""The frame of the command line: help, defaults, suggestions, configuration, old spellings."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from ensemble_rm.cli import console as console_module
from ensemble_rm.cli.command import Command, Invocation
from ensemble_rm.cli.console import Console, Progress
from ensemble_rm.cli.main import (
    PANELS,
    RENAMED,
    command_names,
    find_command,
    load_command,
    main,
    parse,
)
from ensemble_rm.cli.options import (
    Leaf,
    build,
    leaves,
    nested,
    option,
    read_days,
    settings,
    write_config,
)
from ensemble_rm.cli.score import Score
from ensemble_rm.cli.serve import Serve
from ensemble_rm.cli.signatures import default_of
from ensemble_rm.errors import OptionError

NAMES = command_names()
each_command = pytest.mark.parametrize("name", NAMES)


def read(*words: str) -> Any:
    invocation = parse(words)
    assert isinstance(invocation, Invocation)
    return invocation.command


# Help --------------------------------------------------------------------------------------------


@each_command
def test_every_option_has_help_and_a_default(name: str) -> None:
    for leaf in leaves(find_command(name)):
        text = re.fullmatch(r"(.+) \((default: .+|required)\)", leaf.help)
        assert text is not None and len(text[1]) > 4, f"{name} {leaf.flag}: {leaf.help!r}"
        assert "\n" not in leaf.help


def test_the_help_of_a_recipe_is_not_cut_and_shows_sizes_in_units() -> None:
    shown = {leaf.flag: leaf.help for leaf in leaves(find_command("train"))}
    assert shown["--smoothing"] == "label smoothing ε, in [0, 1) (default: 0)"
    assert shown["--states-limit"].endswith("(default: 16GiB)")
    assert shown["--blocks"].endswith("(default: branch: 2; lora: all)")


@each_command
def test_every_option_can_be_typed_once(name: str) -> None:
    flags = [leaf.flag for leaf in leaves(find_command(name))]
    assert len(set(flags)) == len(flags)
    assert not {"--config", "--json", "--help"} & set(flags)


@each_command
def test_help_shows_text_example_and_exit_codes(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"ensemble-rm {name}" in shown and "example:" in shown and "exit codes:" in shown
    for leaf in leaves(find_command(name)):
        assert leaf.flag in shown


@each_command
def test_the_example_is_understood(name: str) -> None:
    import shlex

    example = find_command(name).example.replace("\\\n", " ")
    for line in example.splitlines():
        words = shlex.split(line)
        assert words[0] == "ensemble-rm"
        assert isinstance(parse(words[1:]), Invocation)
    assert f"ensemble-rm {name}" in example


def test_the_list_of_commands_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for panel, commands in PANELS.items():
        assert f"─ {panel} ─" in shown
        assert all(f" {name} " in shown for name in commands)
    assert main([]) == 2
    assert main(["versions"]) == 2


@each_command
def test_an_option_is_not_a_text_where_it_is_a_number_or_a_choice(name: str) -> None:
    """Typer shows and completes what the dataclass says."""
    shown = {"__".join(leaf.path): leaf for leaf in leaves(find_command(name))}
    for parameter in load_command(name).params:
        leaf = shown.get(parameter.name)
        if leaf is not None and leaf.choices:
            completed = parameter.shell_complete(None, leaf.choices[-1])
            assert leaf.choices[-1] in [item.value for item in completed]


def test_shell_completion_completes_subcommands() -> None:
    words = {"_ENSEMBLE_RM_COMPLETE": "complete_bash", "COMP_WORDS": "ensemble-rm versions r"}
    code = (
        "import os, sys\n"
        f"os.environ.update({words!r}, COMP_CWORD='2')\n"
        "sys.argv = ['ensemble-rm']\n"
        "from ensemble_rm.cli.main import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert {"rollback", "repair"} <= set(done.stdout.split()), done.stderr


# Defaults ----------------------------------------------------------------------------------------


def nested_kinds(kind: type) -> list[type]:
    found = []
    for each in fields(kind):
        if "kind" in each.metadata:
            found += [each.metadata["kind"], *nested_kinds(each.metadata["kind"])]
    return found


@each_command
def test_defaults_are_those_of_the_dataclasses(name: str) -> None:
    command = find_command(name)
    values = {leaf.path: leaf.default for leaf in leaves(command) if leaf.default is not MISSING}
    for kind in [command, *nested_kinds(command)]:
        required = any(
            each.default is MISSING and each.default_factory is MISSING for each in fields(kind)
        )
        if required:
            continue
        own = kind()
        for path, default in values.items():
            if len(path) > 1 and path[-1] in {each.name for each in fields(kind)}:
                candidates = [
                    getattr(k(), path[-1])
                    for k in nested_kinds(command)
                    if path[-1] in {e.name for e in fields(k)}
                    and not any(
                        e.default is MISSING and e.default_factory is MISSING for e in fields(k)
                    )
                ]
                assert default in candidates
        assert is_dataclass(own)


def test_a_changed_default_of_the_library_is_the_options() -> None:
    @dataclass(frozen=True)
    class Library:
        speed: float = field(default=2.5, metadata={"help": "speed of it"})

    @dataclass(frozen=True, kw_only=True)
    class Cli:
        inner: Library = nested(Library)

    Cli.__annotations__["inner"] = Library
    (leaf,) = leaves(Cli)
    assert leaf.help == "speed of it (default: 2.5)"
    assert build(Cli, {}).inner == Library()


SIGNATURES = [
    ("ensemble_rm.active_learning.selection", "select_pairs"),
    ("ensemble_rm.active_learning.routing", "route"),
    ("ensemble_rm.best_of_n.sampling", "make_pairs"),
    ("ensemble_rm.ensemble.reward_ensemble", "RewardEnsemble.calibrate"),
    ("ensemble_rm.ensemble.streaming", "stream_scores"),
    ("ensemble_rm.evaluation.evaluation", "evaluate"),
    ("ensemble_rm.evaluation.precision", "precision_report"),
    ("ensemble_rm.aggregation.aggregator", "make_aggregator"),
]


@pytest.mark.parametrize(("module", "function"), SIGNATURES)
def test_a_default_read_from_the_source_is_the_functions(module: str, function: str) -> None:
    thing: Any = import_module(module)
    for part in function.split("."):
        thing = getattr(thing, part)
    plain_types = (str, int, float, bool, type(None))
    compared = 0
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.default is not inspect.Parameter.empty and isinstance(
            parameter.default, plain_types
        ):
            assert default_of(module, function, parameter.name) == parameter.default
            compared += 1
    assert compared


@pytest.mark.parametrize(
    ("function", "parameter"),
    [("no_such", "x"), ("select_pairs", "no_such"), ("select_pairs", "progress")],
)
def test_a_default_that_is_not_there_is_an_error(function: str, parameter: str) -> None:
    with pytest.raises(LookupError):
        default_of("ensemble_rm.active_learning.selection", function, parameter)


def choices(name: str, option_name: str) -> tuple[str, ...]:
    (leaf,) = [leaf for leaf in leaves(find_command(name)) if leaf.path[-1] == option_name]
    return leaf.choices


def test_choices_are_what_the_library_knows() -> None:
    from ensemble_rm.active_learning.acquisition import STRATEGIES
    from ensemble_rm.active_learning.tasks import FORMATS as TASKS
    from ensemble_rm.calibration.calibrator import CALIBRATORS, find_calibrator
    from ensemble_rm.calibration.ties import TIE_MODELS
    from ensemble_rm.judgments.imports.formats import FORMATS
    from ensemble_rm.members.remote.protocols import WIRES

    find_calibrator("temperature")  # registers them
    assert set(choices("calibrate", "method")) == set(CALIBRATORS)
    assert set(choices("calibrate", "ties")) == set(TIE_MODELS)
    assert set(choices("select", "strategy")) == set(STRATEGIES)
    assert set(choices("select", "format")) == set(choices("route", "format")) == set(TASKS)
    assert set(choices("judgments import", "format")) == set(FORMATS)
    assert set(choices("remote", "protocol")) == {*WIRES, "judge"}


def test_no_help_loads_anything_heavy() -> None:
    """In one interpreter, since a start costs more than a help text."""
    from tests.test_public_names import HEAVY, modules_after

    code = (
        "import contextlib, io\nfrom ensemble_rm.cli.main import command_names, main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    for name in command_names():\n"
        "        assert main([*name.split(), '--help']) == 0\n"
    )
    loaded = modules_after(code)
    assert "typer" in loaded and loaded.isdisjoint(HEAVY)
    assert "scipy" not in loaded  # a second on its own


# Values ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Everything:
    number: int = option("a number", default=3)
    share: float | None = option("a share", default=0.5)
    shares: tuple[float, float] = option("two shares", default=(0.5, 0.5))
    priors: tuple[float, ...] = option("priors", default=(1.0,))
    names: tuple[str, ...] = option("names", default=())
    weights: dict[str, float] = option("weights", default=None)
    kind: Literal["head", "branch"] = option("kind", default="head")
    path: Path = option("path", default=Path("x"))
    on: bool = option("switch", default=False)
    at: datetime | None = option("time", default=None)
    days: float | None = option("days", default=None, parse=read_days)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("number", "7", 7),
        ("number", 7.0, 7),
        ("share", "1e-4", 1e-4),
        ("share", "none", None),
        ("share", None, None),
        ("shares", ["0.25", "0.75"], (0.25, 0.75)),
        ("priors", ["1,2", "3"], (1.0, 2.0, 3.0)),
        ("priors", [1, 2.5], (1.0, 2.5)),
        ("names", ["a,b", "c"], ("a,b", "c")),
        ("weights", ["a=b=2"], {"a=b": 2.0}),
        ("weights", {"a": 2}, {"a": 2.0}),
        ("kind", "branch", "branch"),
        ("path", "a/b", Path("a/b")),
        ("on", "yes", True),
        ("days", "60d", 60.0),
        ("days", 60, 60.0),
        ("at", "2026-11-30T00:00+02:00", datetime.fromisoformat("2026-11-29T22:00+00:00")),
    ],
)
def test_a_value_is_read_from_text_and_from_yaml(name: str, given: Any, value: Any) -> None:
    assert getattr(build(Everything, {name: given}), name) == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"number": "x"}, "--number: 'x' is not a whole number"),
        ({"number": 1.5}, "--number: 1.5 is not a whole number"),
        ({"number": True}, "--number: True is not a whole number"),
        ({"number": None}, "--number: a value is needed"),
        ({"share": "much"}, "--share: 'much' is not a number"),
        ({"shares": ["1"]}, "--shares: 2 values are needed, not 1"),
        ({"kind": "hed"}, "--kind: 'hed' is not known; did you mean head?"),
        ({"kind": "zzz"}, "choose from head, branch"),
        ({"path": 3}, "--path: 3 is not text"),
        ({"on": "perhaps"}, "is not yes or no"),
        ({"weights": ["a"]}, "--weights: needs NAME=VALUE"),
        ({"weights": ["a=b"]}, "'b' is not a number"),
        ({"days": "soon"}, "--days: 'soon' is not a number of days"),
        ({"at": "soon"}, "--at: "),
        ({"nmber": 3}, "unknown setting 'nmber'; did you mean number?"),
    ],
)
def test_a_bad_value_is_named_with_its_option(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        build(Everything, given)
    assert message in str(caught.value)


def test_a_dataclass_survives_yaml(tmp_path: Path) -> None:
    values = build(
        Everything,
        {"share": None, "weights": {"a": 1}, "at": "2026-01-01", "names": ["x"], "days": "3d"},
    )
    path = tmp_path / "c.yaml"
    write_config(path, "everything", values)
    assert build(Everything, yaml.safe_load(path.read_text())) == values
    assert build(Everything, json.loads(json.dumps(settings(values)))) == values


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("scor x", "did you mean 'score'?"),
        ("score x --dat y", "no such option: --dat; did you mean --data?"),
        ("score x --data y --aggregator minimm", "did you mean minimum?"),
        ("score x --data y --chunk many", "--chunk: 'many' is not a whole number"),
        ("score x", "missing option --data; see ensemble-rm score --help"),
        ("score", "missing argument ENSEMBLE"),
        ("score x y --data z", "unexpected extra argument"),
        ("judgments imprt", "did you mean 'import'?"),
        ("calibrate x --data y --method isotonc", "did you mean isotonic?"),
        ("versions runs/hh", "ensemble-rm versions list runs/hh"),
        ("remote http://x --self-test off", "--self-test is now --raw-logit-check"),
        ("remote http://x --self-test=off", "--self-test is now --raw-logit-check"),
        ("route x --data y", "give one of --threshold and --share"),
        *(
            (f"{old} runs/hh", f"'{old}' is now 'ensemble-rm {new}'")
            for old, new in RENAMED.items()
        ),
    ],
)
def test_a_mistake_costs_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    heard = capsys.readouterr()
    assert message.lower() in heard.err.lower()
    assert heard.err.count("\n") == 1 and heard.out == ""
    assert main([*words.split(), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


# Configuration files -----------------------------------------------------------------------------


@each_command
def test_a_command_survives_its_configuration_file(name: str, tmp_path: Path) -> None:
    import shlex

    line = find_command(name).example.replace("\\\n", " ").splitlines()[-1]
    invocation = parse(shlex.split(line)[1:])
    assert isinstance(invocation, Invocation)
    path = tmp_path / "config.yaml"
    write_config(path, invocation.name, invocation.command)
    again = parse([*invocation.name.split(), f"--config={path}"])
    assert isinstance(again, Invocation)
    assert settings(again.command) == settings(invocation.command)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(
        json.dumps({"ensemble": "a", "data": "d", "aggregator": {"name": "lcb", "kappa": 2}})
    )
    command: Score = read("score", f"--config={path}", "--kappa=3", "--data=e")
    aggregator = command.aggregator.make()
    assert aggregator is not None and str(aggregator) == "lcb(kappa=3.0)"
    assert (command.ensemble, command.data) == (Path("a"), "e")


def test_a_nested_setting_is_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("ensemble: runs/hh\nserver:\n  batching:\n    batch_tokens: 5\n")
    command: Serve = read("serve", "--config", str(path), "--batch-samples", "6")
    batching = command.server.batching
    assert (batching.batch_tokens, batching.batch_samples) == (5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ensemble: [", "not valid YAML"),
        ("- 1", "must hold a mapping"),
        ("ensmble: x", "unknown setting 'ensmble'; did you mean ensemble?"),
        ("aggregator:\n  lamda: 1", "unknown setting 'aggregator.lamda'; did you mean lam?"),
        ("aggregator: lcb", "aggregator: 'lcb' must be a mapping"),
        ("chunk: many", "--chunk: 'many' is not a whole number"),
    ],
)
def test_a_bad_file_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert main(["score", "x", "--data", "y", "--config", str(path)]) == 2
    heard = capsys.readouterr().err
    assert message in heard and "Traceback" not in heard
    assert main(["score", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


# What is printed ---------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_a_line_every_30_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    with Progress("train", bars=False) as progress:
        for second in range(91):
            now[0] = float(second)
            progress("reading", second, 180)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"ensemble-rm train: reading: {done} of 180, 1/s, {180 - done} s left"
        for done in (30, 60, 90)
    ]


def test_what_was_done_before_a_stage_began_does_not_count_for_its_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now[0])
    with Progress("train", bars=False) as progress:
        for now[0], done in ((40.0, 100), (80.0, 140)):
            progress("reading", done, 180)
    assert capsys.readouterr().err.splitlines() == [
        "ensemble-rm train: reading: 100 of 180",
        "ensemble-rm train: reading: 140 of 180, 1/s, 40 s left",
    ]


def test_on_a_terminal_progress_is_a_bar_per_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("train", bars=True) as progress:
        progress("reading", 10, 40)
        progress("fitting", 10, 40)
        progress("fitting", 20, 40)
    shown = capsys.readouterr().err
    assert "fitting" in shown and "20/40" in shown and "/s" in shown


def test_the_end_says_what_was_read_and_saved_but_not_under_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for json_wanted in (False, True):
        console = Console("score", json=json_wanted)
        console.next("ensemble-rm compare")
        console.read("3 samples")
        console.save(Path("out.jsonl"))
        console.result({"n": 3}, "three")
        console.finish(Path("out.jsonl.score.yaml"))
        heard = capsys.readouterr()
        if json_wanted:
            assert json.loads(heard.out) == {"n": 3} and heard.err == ""
        else:
            assert heard.out == "three\n"
            labels = [line.split(":")[0] for line in heard.err.splitlines()]
            assert labels == ["read", "saved", "config", "next"]


def test_a_command_is_abstract() -> None:
    with pytest.raises(TypeError):
        Command()  # type: ignore[abstract]
    assert isinstance(leaves(Score)[0], Leaf)
