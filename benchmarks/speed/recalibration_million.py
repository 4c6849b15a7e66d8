"""A million judgments with stored scores: one run of the job, its time and its memory.

One judgment a pair, two pairs a prompt, forty months, a true T of 2 under an incumbent of 1; the
scores of five members lie in the run's table, so that no model is loaded. The stores are filled
first and not timed here (`judgments.py` times imports). Each run is a process of its own, which
says its time, the processor's, and the peak of its resident memory above what its imports took:
`window` looks at the newest 180 days, `whole` at all forty months.

`peak_growth_STEP` is the peak on the large store over that on a store with a tenth of the
judgments; `bytes_a_judgment` is what the large one's `whole` takes for each more.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter, process_time

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import Figures, make_parser, resident
from ensemble_rm import FunctionScorer, Judgment, JudgmentStore, RewardEnsemble, recalibrate
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.calibration.calibration import fit_calibration
from ensemble_rm.calibration.scored_pairs import ScoredPairs
from ensemble_rm.evidence.score_table import ScoreTable
from ensemble_rm.recalibration import RecalibrationOptions
from ensemble_rm.versions.integrity import digest_members

BEGIN = datetime(2023, 1, 1, tzinfo=UTC)
MONTHS = 40
MEMBERS = 5
BLOCK = 5000
STEPS = ("window", "whole")


def write_run(folder: Path) -> str:
    """Write an ensemble's description and its calibration at T = 1; return the members' digest."""
    rng = np.random.default_rng(1)
    sides = rng.normal(size=(2, 2000, 1)) + rng.normal(0, 0.2, (2, 2000, MEMBERS))
    p = 1 / (1 + np.exp(-(sides[0] - sides[1]).mean(axis=1)))
    pairs = ScoredPairs(sides[0], sides[1], p, np.ones(2000), np.arange(2000))
    members = tuple(FunctionScorer(str(i), lambda _: 0.0) for i in range(MEMBERS))
    normaliser = Normaliser.identity(MEMBERS)
    calibration = fit_calibration(pairs, mean())
    ensemble = RewardEnsemble(members, normaliser, mean(), calibration)
    (folder / "members").mkdir(parents=True)
    said = {
        "format": 1,
        "members": [],
        "normaliser": normaliser.to_json(),
        "aggregator": ensemble.aggregator.to_json(),
        "calibration": calibration.to_json(),
        "provenance": {},
    }
    (folder / "ensemble.json").write_text(json.dumps(said))
    return digest_members(folder)


def fill(store: JudgmentStore, table: ScoreTable, n: int) -> None:
    """Add judgments and the scores of their pairs, block by block."""
    rng = np.random.default_rng(0)

    def judgments() -> Iterator[Judgment]:
        for start in range(0, n, BLOCK):
            scores = rng.normal(size=(BLOCK, 2, 1)) + rng.normal(0, 0.2, (BLOCK, 2, MEMBERS))
            margins = scores.mean(axis=2) @ [1.0, -1.0]
            won = rng.random(BLOCK) < 1 / (1 + np.exp(-margins / 2))
            made = []
            for i in range(BLOCK):
                at = BEGIN + timedelta(days=30 * MONTHS * (start + i) / n)
                name = start + i
                sides = (f"answer {name} a", f"answer {name} b")
                one = Judgment(
                    f"question {name // 2}", *sides, "first" if won[i] else "second", "ann", at, "s"
                )
                _, first, second = one.text_digests
                if first > second:
                    scores[i] = scores[i, ::-1]
                made.append(one)
            table.put([one.pair_digest for one in made], scores)
            yield from made

    store.add(judgments())


def run_step(step: str, folder: Path) -> None:
    """Run the job dry in this process; print what it took."""
    gc.collect()
    before = resident("VmRSS")
    wall, spent = perf_counter(), process_time()
    with JudgmentStore.open(folder / "judgments.db", read_only=True) as store:
        options = RecalibrationOptions(window=180 if step == "window" else None, dry_run=True)
        found = recalibrate(folder / "run", store, options=options)
    took = perf_counter() - wall
    assert found.details["gate"] is not None, found.reason
    count = found.details["judgments"]["count"]
    print(f"found {took} {process_time() - spent} {resident('VmHWM') - before} {count}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        run_step(args.step, args.folder)
        return
    figures = Figures(args)
    large = 50_000 if args.quick else 1_000_000
    peaks: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory() as name:
        for n in (large // 10, large):
            folder = Path(name) / str(n)
            members = write_run(folder / "run")
            with JudgmentStore.create(folder / "judgments.db") as store:
                fill(store, ScoreTable(folder / "run", members, read_only=False), n)
            for step in STEPS:
                command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                took, cpu, peak, count = map(float, done.stdout.split("found ")[1].split())
                peaks[step, n] = peak
                figures.add_repeats(f"seconds_{step}_{n}", [took])
                figures.add_repeats(f"cpu_seconds_{step}_{n}", [cpu])
                figures.add_repeats(f"peak_mib_{step}_{n}", [peak])
                figures.add_repeats(f"judgments_{step}_{n}", [count])
    for step in STEPS:
        figures.add_repeats(f"peak_growth_{step}", [peaks[step, large] / peaks[step, large // 10]])
    more = (peaks["whole", large] - peaks["whole", large // 10]) * 2**20 / (0.9 * large)
    figures.add_repeats("bytes_a_judgment", [more])
    figures.write()


if __name__ == "__main__":
    main()
