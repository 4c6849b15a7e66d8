"""What every benchmark shares: its options, its figures, what it says of the machine."""

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

HERE = Path(__file__).parent


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the same code on less work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    return parser


def machine() -> dict[str, Any]:
    """Say what ran this, and how busy it was."""
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


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def resident(field: str) -> float:
    """Read what this process holds (VmRSS), or has held at most (VmHWM), in MiB.

    getrusage would count what its parent held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


class Figures:
    """Named figures, printed as they come and written at the end."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.found: dict[str, dict[str, float]] = {}
        self.machine = machine()
        print(f"machine: {self.machine}")

    def add(self, name: str, median: float, low: float, high: float, n: int) -> None:
        self.found[name] = {
            "median": float(median),
            "low": float(low),
            "high": float(high),
            "n": int(n),
        }
        print(f"{name:36s} {median:+.6g} [{low:.6g}, {high:.6g}] n={n}", flush=True)

    def add_repeats(self, name: str, values: list[float]) -> None:
        self.add(name, float(np.median(values)), min(values), max(values), len(values))

    def write(self) -> None:
        print(f"load at the end: {os.getloadavg()[0]:.2f}")
        if self.args.json is None:
            return
        name = Path(sys.argv[0]).stem
        words = [a for a in sys.argv[1:] if not a.startswith("--json")]
        shown = " ".join(
            Path(w).name if w.startswith("/") else w for w in words if w != str(self.args.json)
        )
        said = {
            "name": name,
            "command": f"python benchmarks/{name}.py {shown}".strip(),
            "commit": commit(),
            "machine": self.machine,
            "figures": self.found,
        }
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(said, indent=1) + "\n")


def seconds(work: Callable[[], Any]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began
