"""The public names: sorted, complete, documented, and cheap to import."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import ensemble_rm

HEAVY = ("accelerate", "datasets", "gguf", "matplotlib", "netcal", "pandas", "sklearn", "torch")
HEAVY += ("alembic", "httpx", "peft", "psycopg", "sqlalchemy", "transformers")
HEAVY += ("fastapi", "prometheus_client", "pydantic", "starlette", "uvicorn")

PACKAGE = Path(ensemble_rm.__file__).parent
ROOMS = sorted(f"ensemble_rm.{stub.parent.name}" for stub in PACKAGE.glob("*/__init__.pyi"))
PUBLIC = sorted(
    {
        f"{module}.{name}"
        for module in ("ensemble_rm", *ROOMS)
        for name in import_module(module).__all__
        if f"{module}.{name}" not in ROOMS and name not in ("errors", "metrics")
    }
)
each_name = pytest.mark.parametrize("name", PUBLIC)


def resolve(name: str) -> Any:
    module, _, leaf = name.rpartition(".")
    return getattr(import_module(module), leaf)


def modules_after(code: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds once it ran `code`."""
    report = "\nimport sys, json; sys.stderr.write('\\n' + json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


def test_importing_loads_nothing_heavy() -> None:
    assert modules_after("import ensemble_rm").isdisjoint(HEAVY)


COMMANDS = [
    [],
    ["train"],
    ["score"],
    ["precision"],
    ["serve"],
    ["init-reward"],
    ["make-pairs"],
    ["judgments", "import"],
    ["demo"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    code = (
        "import contextlib\nfrom ensemble_rm.cli.main import main\n"
        f"with contextlib.suppress(SystemExit): main({[*command, '--help']!r})"
    )
    assert modules_after(code).isdisjoint(HEAVY)


def test_the_top_level_is_small() -> None:
    """The few names that everybody needs; all else is public in its subpackage."""
    names = [name for name in PUBLIC if name.count(".") == 1]
    assert 20 <= len(names) <= 30
    for name in names:
        leaf = name.rpartition(".")[2]
        homes = [f"{room}.{leaf}" for room in ROOMS if f"{room}.{leaf}" in PUBLIC]
        assert len(homes) == 1, f"{name} is public in {homes}"
        assert resolve(name) is resolve(homes[0])


def test_every_room_with_public_names_is_reached_from_the_top() -> None:
    assert set(ROOMS) <= {f"ensemble_rm.{name}" for name in ensemble_rm.__all__}


@pytest.mark.parametrize("module", ["ensemble_rm", *ROOMS])
def test_no_public_name_is_also_a_modules(module: str) -> None:
    """A name that a submodule bears, too, would mean the one or the other by import order."""
    folder = PACKAGE.joinpath(*module.split(".")[1:])
    files = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    packages = {room.rpartition(".")[2] for room in ROOMS} | {"errors", "metrics"}
    names = set(import_module(module).__all__)
    assert not names & (files - packages if module == "ensemble_rm" else files)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        ensemble_rm.no_such_name  # noqa: B018


def sections(doc: str) -> set[str]:
    """The headings of a numpydoc docstring."""
    return set(re.findall(r"^(\w[\w ]*)\n-{3,}$", doc, flags=re.MULTILINE))


def described(doc: str) -> set[str]:
    """The names that a docstring's entries describe."""
    entries = re.findall(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: ?:|$)", doc, flags=re.MULTILINE)
    return {name.strip(" *") for entry in entries for name in entry.split(",")}


def parameters(thing: Any) -> set[str]:
    return {
        name for name in inspect.signature(thing).parameters if not name.startswith(("_", "self"))
    }


def check(thing: Any, where: str) -> None:
    doc = inspect.getdoc(thing) or ""
    assert doc.split("\n")[0].endswith((".", ":")), f"{where}: the summary line of its docstring"
    wanted = parameters(thing)
    if wanted:
        headings = {"Parameters", "Attributes"} & sections(doc)
        assert headings, f"{where}: a section Parameters, for {sorted(wanted)}"
    assert not (missing := wanted - described(doc)), f"{where}: describe {sorted(missing)}"


@each_name
def test_every_public_name_is_documented(name: str) -> None:
    thing = resolve(name)
    if inspect.isfunction(thing):
        check(thing, name)
        returned = inspect.signature(thing).return_annotation
        if returned not in (None, "None"):
            doc = inspect.getdoc(thing) or ""
            assert {"Returns", "Yields"} & sections(doc), f"{name}: a section Returns"
    elif inspect.isclass(thing):
        doc = inspect.getdoc(thing) or ""
        assert not doc.startswith(f"{thing.__name__}("), f"{name}: has no docstring of its own"
        if is_dataclass(thing):
            wanted = {field.name for field in fields(thing) if not field.name.startswith("_")}
            assert not (missing := wanted - described(doc)), f"{name}: describe {sorted(missing)}"
        for method, function in vars(thing).items():
            if not method.startswith("_"):
                plain = getattr(function, "__func__", function)
                assert not callable(plain) or inspect.getdoc(plain), f"{name}.{method}: docstring"
    else:
        pytest.fail(f"{name} is neither a function nor a class: export what documents itself")
