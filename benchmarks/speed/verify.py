"""What checking a saved ensemble's files adds to loading it, SmolLM2-135M, one thread.

Five heads over SmolLM2 are saved, then loaded in turn with `verify="full"`, which hashes every
file, and with `verify="stat"`, which compares the sizes of large files; both open the model and
score one sample. The files are in the page cache, which is the worst case for hashing: from a
disk, both sides also wait for the same bytes. `verify_share` is 1 − stat/full.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from benchmarks.shared.common import Figures, make_parser, seconds
from benchmarks.shared.preference_runs import package_folder
from benchmarks.shared.scoring_sides import K, heads
from ensemble_rm import RewardEnsemble, Sample, TrunkOptions
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.members.backbone.checkpoint import locate

SAMPLE = [Sample("What is soap?", "A salt of a fatty acid.")]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/ensemble_rm").expanduser())
    parser.add_argument("--repeats", type=int, default=10)
    args: argparse.Namespace = parser.parse_args()
    if args.quick:
        args.repeats = 3
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    figures = Figures(args)
    backbone = locate(package_folder("smollm2"), cache_dir=args.cache_dir)
    scorer = heads(backbone, TrunkOptions(dtype="bfloat16", device="cpu"))

    def load(folder: Path, verify: Literal["full", "stat"]) -> None:
        RewardEnsemble.from_pretrained(folder, device="cpu", verify=verify).score(SAMPLE)

    with tempfile.TemporaryDirectory() as name:
        folder = RewardEnsemble([scorer], Normaliser.identity(K), mean()).save_pretrained(
            Path(name) / "saved"
        )
        load(folder, "full")
        full, stat = [], []
        for repeat in range(args.repeats):
            sides = [("full", full), ("stat", stat)]
            for verify, took in sides if repeat % 2 else reversed(sides):
                took.append(seconds(lambda v=verify: load(folder, v)))  # type: ignore[misc]
            print(f"full {full[-1]:.2f} s, stat {stat[-1]:.2f} s", flush=True)
    figures.add_repeats("verify_share", [1 - b / a for a, b in zip(full, stat, strict=True)])
    figures.add_repeats("full_seconds", full)
    figures.add_repeats("stat_seconds", stat)
    figures.write()


if __name__ == "__main__":
    main()
