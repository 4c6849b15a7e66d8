"""The whole job in one command: train, calibrate, evaluate, with pictures.

On data that ship with the project: completions of a real small model, judged by a simulated
annotator whose true preference probabilities are known (no human judged them). Or, with --data, on
your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ensemble_rm.cli.common import Bars, add_json, add_skip_bad, read_pairs, say

HELP = "train, calibrate and evaluate on data that ship with the project"
EXAMPLE = "  ensemble-rm demo\n  ensemble-rm demo --data pairs.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--data", metavar="FILE_OR_HUB_ID", help="your own preference pairs, instead of ours"
    )
    add_skip_bad(parser)
    parser.add_argument(
        "--backbone", metavar="NAME", help="hub id or local folder (default: MiniLM-L6, installed)"
    )
    parser.add_argument("--members", type=int, default=5, metavar="K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("ensemble-rm-demo"), metavar="FOLDER", help="of the result"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.demo.data import FILE
    from ensemble_rm.demo.run import run_demo

    pairs = read_pairs(args.data or str(FILE), skip_bad=args.skip_bad)
    with Bars(quiet=args.json) as bars:
        result = run_demo(
            pairs,
            out=args.out,
            backbone=args.backbone,
            members=args.members,
            seed=args.seed,
            simulated=args.data is None,
            progress=bars,
        )
    say(args, result.to_json(), result.text())
