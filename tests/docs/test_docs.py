"""The documents: their snippets run, their links lead somewhere, their commands exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from ensemble_rm.cli.main import parse
from ensemble_rm.data.loading import load_preferences
from ensemble_rm.demo.data import FILE
from ensemble_rm.server.wire import registry
from tests.support import CHECKOUT
from tests.test_layering import FLOORS

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


PYTHON = [
    pytest.param(code, id=f"{page.name}-{i}")
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


@pytest.mark.parametrize("code", PYTHON)
def test_a_snippet_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    # What a snippet registers is gone after it.
    monkeypatch.setattr(registry, "_FORMATS", dict(registry._FORMATS))
    rows = [pair.to_json() for pair in load_preferences(FILE)[:900]]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, Any] = {"BACKBONE": minilm_folder}
    exec(compile(code, "snippet", "exec"), names)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command: str) -> None:
    words = shlex.split(command, comments=True)
    invocation = parse(words[1:])
    assert not isinstance(invocation, int) and invocation.name.split()[0] == words[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_file_map_lists_the_rooms_in_the_order_of_the_floors() -> None:
    text = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^  (\w+)(?:\.py|/) ", text, re.M)
    package = CHECKOUT / "ensemble_rm"
    rooms = {p.name for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"}
    rooms |= {p.stem for p in package.glob("*.py") if not p.name.startswith("__")}
    assert sorted(shown) == sorted(rooms)
    floors = [FLOORS[room] for room in shown]
    assert floors == sorted(floors)
