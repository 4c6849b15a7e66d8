"""The recorder counts what runs in the package: every thread, no imports, no other package."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.quality import paths


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[paths.Recorder]:
    """A recorder of a small package of its own."""
    package = tmp_path / "small"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "outer.py").write_text(
        "from small import inner\n"
        "class A:\n"
        "    def run(self): return [inner.double(x) for x in (1, 2)]\n"
        "    def unused(self): pass\n"
        "def late():\n"
        "    import small.imported\n"
    )
    (package / "inner.py").write_text(
        "def double(x):\n    def times(y): return x * y\n    return times(2)\n"
    )
    (package / "imported.py").write_text("def helper(): return 1\nhelper()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(paths, "PACKAGE", f"{package}/")
    for name in [name for name in sys.modules if name.split(".")[0] == "small"]:
        monkeypatch.delitem(sys.modules, name)
    yield paths.Recorder()
    threading.setprofile(None)


@pytest.mark.parametrize("threaded", [False, True])
def test_functions_that_run_are_counted(recorder: paths.Recorder, threaded: bool) -> None:
    outer = importlib.import_module("small.outer")
    outer.A().run()  # before: not recorded
    with recorder.record():
        if threaded:
            thread = threading.Thread(target=outer.A().run)
            thread.start()
            thread.join()
        else:
            outer.A().run()
    assert recorder.result()["files"] == {"inner.py": ["double"], "outer.py": ["A.run"]}


def test_what_runs_at_an_import_does_not_count(recorder: paths.Recorder) -> None:
    outer = importlib.import_module("small.outer")
    with recorder.record():
        outer.late()
        outer.A().run()
    files = recorder.result()["files"]
    assert files == {"inner.py": ["double"], "outer.py": ["A.run", "late"]}


def test_cpu_files_do_not_count_for_scores() -> None:
    files = {"members/forward/cpu/kernels.py": ["quicken"], "members/scorer.py": ["_score"]}
    assert set(paths.counted("score", files)) == {"members/scorer.py"}
    assert paths.counted("train", files) == files
