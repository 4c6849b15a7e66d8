"""Benchmarks: each parses, and each committed result has the promised shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(
    path for path in FOLDER.glob("*.py") if path.name not in ("common.py", "rewarduq_peer.py")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_does(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, check=True
    )
    assert "--quick" in done.stdout and "--json" in done.stdout


@pytest.mark.parametrize("file", sorted((FOLDER / "results").glob("*.json")), ids=lambda p: p.stem)
def test_a_result_has_its_shape(file: Path) -> None:
    said = json.loads(file.read_text())
    assert set(said) == {"name", "command", "commit", "machine", "figures"}
    assert said["name"] == file.stem
    assert (FOLDER / f"{file.stem}.py").exists()
    assert said["figures"]
    for name, figure in said["figures"].items():
        assert set(figure) == {"median", "low", "high", "n"}, name


@pytest.mark.slow
def test_the_quick_calibration_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    script = FOLDER / "calibration_fit.py"
    subprocess.run([sys.executable, str(script), "--quick", f"--json={out}"], check=True)
    figures = json.loads(out.read_text())["figures"]
    assert set(figures) == {"netcal_ratio", "nll_gap"}
    assert abs(figures["nll_gap"]["median"]) < 1e-6
