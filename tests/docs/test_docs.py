"""The documents: their snippets run, their links lead somewhere, their commands exist."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from ensemble_rm import errors
from ensemble_rm.cli.main import parse
from ensemble_rm.data.loading import (
    load_preferences,
    read_comparisons,
    read_jsonl,
    read_samples,
)
from ensemble_rm.demo.data import FILE
from ensemble_rm.judgments.judgment import Judgment
from ensemble_rm.members import registry as kinds
from ensemble_rm.server.wire import registry
from tests.support import CHECKOUT
from tests.test_layering import FLOORS
from tests.test_public_names import PUBLIC, resolve

PAGES = [
    CHECKOUT / "README.md",
    CHECKOUT / "CONTRIBUTING.md",
    *sorted((CHECKOUT / "docs").rglob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def runnable(page: Path) -> list[str]:
    """Python blocks, but for those that stand below a reason why they cannot run."""
    text = page.read_text(encoding="utf-8")
    reason = r"^<!-- snippet: skip \S[^\n]* -->\n"
    skipped = re.findall(reason + r"```python\n(.*?)^```", text, re.S | re.M)
    return [code for code in blocks(page, "python") if code not in skipped]


def output_of(page: Path, code: str) -> str | None:
    """The output that a page shows right below a block."""
    text = page.read_text(encoding="utf-8")
    below = text[text.index(code) + len(code) :]
    shown = re.match(r"```\n\n```text\n(.*?)^```", below, re.S | re.M)
    return None if shown is None else shown[1]


NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
PYTHON = [
    pytest.param(code, output_of(page, code), id=f"{page.name}-{i}")
    for page in PAGES
    for i, code in enumerate(runnable(page))
]
COMMANDS = [
    line
    for page in PAGES
    for code in blocks(page, "sh")
    for line in code.splitlines()
    if line.startswith("ensemble-rm")
]


@pytest.mark.parametrize(("code", "shown"), PYTHON)
def test_a_snippet_runs(
    code: str,
    shown: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    minilm_folder: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    # What a snippet registers is gone after it.
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    rows = [pair.to_json() for pair in load_preferences(FILE)[:900]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A module of its own, as a user's file is: a registered kind is imported by its module's name.
    snippet = ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", snippet)
    vars(snippet)["BACKBONE"] = minilm_folder
    exec(compile(code, "snippet", "exec"), vars(snippet))
    if shown is not None:  # other processors round differently
        printed = capsys.readouterr().out
        numbers = [float(number) for number in NUMBER.findall(printed)]
        assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
        assert numbers == pytest.approx([float(n) for n in NUMBER.findall(shown)], abs=0.05)


def examples(kind: str) -> list[str]:
    """The JSON Lines of a kind that the pages show."""
    block = rf"^<!-- data: {kind} -->\n```json\n(.*?)^```"
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    return [block_ for text in texts for block_ in re.findall(block, text, re.S | re.M)]


READERS: dict[str, Callable[[Path], int]] = {
    "preferences": lambda path: len(load_preferences(path)),
    "samples": lambda path: len(list(read_samples(path))),
    "comparisons": lambda path: len(read_comparisons(path)),
    "judgments": lambda path: len([Judgment.from_json(row) for _, row in read_jsonl(path)]),
}


@pytest.mark.parametrize("kind", READERS)
def test_the_rows_that_are_shown_can_be_read(kind: str, tmp_path: Path) -> None:
    shown = examples(kind)
    assert shown
    for i, rows in enumerate(shown):
        path = tmp_path / f"{i}.jsonl"
        path.write_text(rows, encoding="utf-8")
        assert READERS[kind](path) == len(rows.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    words = shlex.split(command, comments=True)
    invocation = parse(words[1:])
    assert not isinstance(invocation, int) and invocation.name.split()[0] == words[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


# Classes of other packages, an alert, and a callback that needs TRL.
FOREIGN = {"GRPOTrainer", "RLOOTrainer", "TrainingArguments", "HistogramBinning"}
FOREIGN |= {"RewardVersionsDiffer", "MonitorCallback"}


def test_all_five_extensions_are_shown_in_under_thirty_lines() -> None:
    page = CHECKOUT / "docs" / "extending.md"
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)[1:]
    shown = {
        text.splitlines()[0]: re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
        for text in sections
    }
    wanted = {"member", "aggregator", "calibrator", "import format", "wire format"}
    assert {title.partition(" ")[2] for title in shown} == wanted
    for codes in shown.values():
        lines = [line for line in codes[0].splitlines() if line.strip()]
        assert len(codes) == 1 and len(lines) < 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_classes_that_are_named_exist(page: Path) -> None:
    if page.name == "changelog.md":
        return
    public = {name.rpartition(".")[2]: name for name in PUBLIC}
    named = re.findall(r"`([A-Z][a-z]+[A-Z]\w*)(?:\.(\w+))?[`(]", page.read_text(encoding="utf-8"))
    for name, member in named:
        if name in FOREIGN:
            continue
        thing = getattr(errors, name, None) or resolve(public[name])
        fields_ = getattr(thing, "__dataclass_fields__", {})
        assert not member or hasattr(thing, member) or member in fields_, f"{name}.{member}"


def test_the_file_map_lists_the_rooms_in_the_order_of_the_floors() -> None:
    text = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^  (\w+)(?:\.py|/) ", text, re.M)
    package = CHECKOUT / "ensemble_rm"
    rooms = {p.name for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    rooms |= {p.stem for p in package.glob("*.py") if not p.name.startswith("__")}
    assert sorted(shown) == sorted(rooms)
    floors = [FLOORS[room] for room in shown]
    assert floors == sorted(floors)
