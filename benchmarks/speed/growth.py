"""Linear growth at flat memory: `ensemble-rm score`'s way from 100 to 100,000 samples, one thread.

Five heads with a view each on MiniLM-L6 in float32 score a JSONL file of short texts, all distinct,
so that nothing is read from a cache: read, tokenised, scored and written chunk by chunk, 4,096
samples a chunk. Each size runs in a process of its own, warm: the model is loaded before the clock
starts. The peak is that of the process's resident memory above its imports, the model included.

`growth_exponent` is the slope of log seconds on log samples from 1,000 samples on: 1 is linear.
Heads are random vectors: what a weight is does not matter to time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import Figures, make_parser, resident, seconds
from benchmarks.shared.preference_runs import package_folder
from benchmarks.shared.scoring_sides import random_heads
from ensemble_rm import RewardEnsemble, TrunkOptions
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.common import write_jsonl
from ensemble_rm.cli.console import Progress
from ensemble_rm.cli.score import score_rows
from ensemble_rm.data.loading import read_samples
from ensemble_rm.members import HeadScorer
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.trunk import View, default_views

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
SIZES = (100, 1_000, 10_000, 100_000)
K = 5


def write_samples(path: Path, n: int) -> None:
    """Write n rows of short, distinct texts."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        for i in range(n):
            said = " ".join(rng.choice(WORDS, rng.integers(1, 6)))
            stream.write(json.dumps({"prompt": f"Say {i}.", "completion": said}) + "\n")


def write_ensemble(folder: Path) -> None:
    """Save five heads with a view each."""
    views = default_views(6, K)
    scorer = HeadScorer(
        locate(package_folder("minilm")),
        TrunkOptions(device="cpu"),
        [View(view.layer, "both") for view in views],
        random_heads(K, 2 * 384),
    )
    RewardEnsemble((scorer,), Normaliser.identity(K), mean()).save_pretrained(folder)


def one_run(folder: Path, n: int, chunk: int) -> None:
    """Score a file in this process; print its seconds and its peak above the imports, MiB."""
    import transformers.models.bert.modeling_bert  # noqa: F401

    began = resident("VmHWM")
    ensemble = RewardEnsemble.from_pretrained(folder / "run", device="cpu")
    ensemble.score(list(read_samples([{"prompt": "Hello", "completion": "you"}])))
    data, out = folder / f"{n}.jsonl", folder / f"{n}.out"
    count: Counter[str] = Counter()
    with Progress("score", bars=False) as bars:
        rows = score_rows(ensemble, read_samples(data), chunk, bars, count)
        took = seconds(lambda: write_jsonl(out, rows))
    assert count["rows"] == n
    print(f"found {took} {resident('VmHWM') - began}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3, help="of the sizes up to 10,000")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.samples:
        one_run(args.folder, args.samples, args.chunk)
        return
    sizes = SIZES[:2] if args.quick else SIZES
    figures = Figures(args)
    took: dict[int, list[float]] = {n: [] for n in sizes}
    peaks: dict[int, list[float]] = {n: [] for n in sizes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_ensemble(folder / "run")
        for n in sizes:
            write_samples(folder / f"{n}.jsonl", n)
        for repeat in range(1 if args.quick else args.repeats):
            for n in sizes:
                if repeat and n > 10_000:
                    continue
                command = [sys.executable, __file__, "--folder", name, "--samples", str(n)]
                command += ["--chunk", str(args.chunk), "--threads", str(args.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                spent, peak = map(float, done.stdout.split("found ")[1].split())
                took[n].append(spent)
                peaks[n].append(peak)
                print(f"{n}: {spent:.2f} s, {peak:.0f} MiB", flush=True)
    for n in sizes:
        figures.add_repeats(f"seconds_per_sample_{n}", [spent / n for spent in took[n]])
    for n in sizes:
        figures.add_repeats(f"peak_mib_{n}", peaks[n])
    first, last = (sizes[0] if args.quick else 1_000), sizes[-1]
    measured = [n for n in sizes if n >= first]
    medians = [float(np.median(took[n])) for n in measured]
    slope = float(np.polyfit(np.log(measured), np.log(medians), 1)[0])
    figures.add_repeats("growth_exponent", [slope])
    figures.add_repeats("peak_ratio", [float(np.median(peaks[last]) / np.median(peaks[first]))])
    figures.write()


if __name__ == "__main__":
    main()
