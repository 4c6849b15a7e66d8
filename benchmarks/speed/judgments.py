"""A million judgments in SQLite: import, a month's window, agreement; time and memory.

Four judgments a pair, two pairs a prompt, eight annotators, forty months; prompts of about 90 and
completions of about 220 characters, all distinct. The JSONL file is imported as
`ensemble-rm judgments import` does it: read and checked whole, then read again and written. Each
step runs in a process of its own, which says its time, the processor's, and the peak of its
resident memory above what its imports took.

`peak_growth` is the large store's peak over that of the small one, which has a tenth of the
judgments: 1 is flat. `cpu_growth` is the same of the processor's time a judgment. SQLite's page
cache and its sorter take up to 64 MiB each, which the small store does not fill.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import Figures, make_parser, resident, seconds
from ensemble_rm.judgments.agreement import agreement_report
from ensemble_rm.judgments.filter import JudgmentFilter
from ensemble_rm.judgments.imports.importing import import_judgments
from ensemble_rm.judgments.store import JudgmentStore

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "sleeps",
    "under",
    "some",
    "old",
    "oak",
    "tree",
]
BEGIN = datetime(2023, 1, 1, tzinfo=UTC)
MONTH = timedelta(days=30)
MONTHS = 40
STEPS = ("import", "window", "read", "report", "again")


def rows(n: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)

    def text(words: int, name: str) -> str:
        return " ".join([*rng.choices(WORDS, k=words), name])

    step = MONTH * MONTHS / n
    for i in range(n):
        if i % 8 == 0:
            prompt = text(20, str(i))
        if i % 4 == 0:
            sides = [text(48, f"{i} a"), text(48, f"{i} b")]
        flip = rng.random() < 0.5
        yield {
            "prompt": prompt,
            "first": sides[flip],
            "second": sides[not flip],
            "outcome": rng.choices(("first", "second", "tie"), (0.5, 0.4, 0.1))[0],
            "annotator": f"annotator {rng.randrange(8)}",
            "judged_at": (BEGIN + i * step).isoformat(),
            "source": "benchmark",
            "external_id": str(i),
        }


def work(step: str, folder: Path) -> Callable[[JudgmentStore], int]:
    """Return what a step does; it returns how many judgments it saw."""
    file = folder / "rows.jsonl"
    window = JudgmentFilter(since=BEGIN + 20 * MONTH, until=BEGIN + 21 * MONTH)
    steps: dict[str, Callable[[JudgmentStore], int]] = {
        "import": lambda store: import_judgments(store, file).added,
        "again": lambda store: import_judgments(store, file).already,
        "window": lambda store: sum(pair.weight for pair in store.preferences(window)),
        "read": lambda store: sum(1 for _ in store.read()),
        "report": lambda store: agreement_report(store).judgments,
    }
    return steps[step]


def run_step(step: str, folder: Path) -> None:
    """Do one step in this process; print what it took."""
    with JudgmentStore.create(folder / "warm.db") as warm:
        warm.count()
    gc.collect()
    before = resident("VmRSS")
    with JudgmentStore.create(folder / "store.db") as store:
        seen: list[int] = []
        cpu = process_time()
        took = seconds(lambda: seen.append(work(step, folder)(store)))
        cpu = process_time() - cpu
    print(
        json.dumps(
            {"seconds": took, "cpu": cpu, "mib": resident("VmHWM") - before, "seen": int(seen[0])}
        )
    )


def measure(step: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(args: argparse.Namespace) -> None:
    small, large = (2_000, 20_000) if args.quick else (100_000, 1_000_000)
    figures = Figures(args)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for n in (small, large):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with (folder / "rows.jsonl").open("w") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in rows(n))
            for step in STEPS:
                if step == "again" and n == large:
                    continue
                found[step, n] = measure(step, folder)
                print(f"{n} {step}: {found[step, n]}", flush=True)
            assert found["import", n]["seen"] == found["read", n]["seen"] == n
            figures.add_value(f"file_mib_{n}", size(folder / "rows.jsonl"))
            figures.add_value(f"store_mib_{n}", size(folder / "store.db"))
    for (step, n), one in found.items():
        figures.add_value(f"{step}_seconds_{n}", one["seconds"])
        figures.add_value(f"{step}_cpu_seconds_{n}", one["cpu"])
        figures.add_value(f"{step}_peak_mib_{n}", one["mib"])
    for step in ("import", "read", "report"):
        ratio = {key: found[step, large][key] / found[step, small][key] for key in found[step, n]}
        figures.add_value(f"{step}_cpu_growth", ratio["cpu"] / (large / small))
        figures.add_value(f"{step}_peak_growth", ratio["mib"])
    figures.write()


def size(path: Path) -> float:
    return path.stat().st_size / 2**20


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step is None:
        run(given)
    else:
        run_step(given.step, given.folder)
