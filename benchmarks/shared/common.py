"""Options, figures and the description of the machine that every benchmark uses."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SHARED_DATA = ROOT.parent / "shared" / "data"
"""Preference data next to the checkout; not part of the repository."""

# What `low` and `high` of a figure are, where several benchmarks say the same.
SINGLE = "none: one value"
OVER_PROMPTS = "95 % bootstrap over prompts"
CHANCE = "central 95 % under perfect calibration; the figure is its 95 % quantile"


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="same code, less work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    return parser


def machine() -> dict[str, Any]:
    """Describe the machine and its load."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if "model name" in line]
        name = models[0] if models else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def commit() -> str:
    """Return the commit that is checked out, or "unknown" outside a repository."""
    return git("rev-parse", "HEAD") or "unknown"


def dirty() -> bool:
    """Return whether the package or the benchmarks differ from the commit.

    Results do not count: a run writes some itself.
    """
    paths = ("ensemble_rm", "benchmarks", ":!benchmarks/results")
    return bool(git("status", "--porcelain", "--", *paths))


def resident(field: str) -> float:
    """Return this process's resident memory (VmRSS) or its peak (VmHWM), in MiB.

    getrusage would include the peak of the parent process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


class Figures:
    """Named figures: printed as they are added, written as JSON at the end."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.figures: dict[str, dict[str, float | str]] = {}
        self.machine = machine()
        # At the start: a long run must not record edits that are made while it runs.
        self.commit, self.dirty = commit(), dirty()
        print(f"machine: {self.machine}")

    def add(
        self, name: str, median: float, low: float, high: float, n: int, *, interval: str
    ) -> None:
        """Add a figure; `interval` names what `low` and `high` are."""
        self.figures[name] = {
            "median": float(median),
            "low": float(low),
            "high": float(high),
            "n": int(n),
            "interval": interval,
        }
        print(f"{name:36s} {median:+.6g} [{low:.6g}, {high:.6g}] n={n}", flush=True)

    def add_repeats(self, name: str, values: list[float], *, over: str = "repeats") -> None:
        """Add the median of values with their range."""
        interval = f"range over {over}" if len(values) > 1 else SINGLE
        self.add(
            name, float(np.median(values)), min(values), max(values), len(values), interval=interval
        )

    def add_value(self, name: str, value: float, n: int = 1) -> None:
        """Add a value that was measured once, from `n` observations."""
        self.add(name, value, value, value, n, interval=SINGLE)

    def write(self) -> None:
        print(f"load at the end: {os.getloadavg()[0]:.2f}")
        if self.args.json is None:
            return
        script = Path(sys.argv[0]).resolve()
        words = [a for a in sys.argv[1:] if not a.startswith("--json")]
        shown = " ".join(
            Path(w).name if w.startswith("/") else w for w in words if w != str(self.args.json)
        )
        place = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
        result = {
            "name": script.stem,
            "command": f"python {place} {shown}".strip(),
            "commit": self.commit,
            "dirty": self.dirty,
            "machine": self.machine,
            "figures": self.figures,
        }
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(result, indent=1) + "\n")


def seconds(work: Callable[[], Any]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began
