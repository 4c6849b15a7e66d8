"""Measure an ensemble on judged pairs: members, their mean and every aggregator side by side.

Accuracy, NLL, ECE and what chance makes of it, Brier, before and after calibration, with intervals,
over all pairs and by `subset`; what pooling the members buys; and a reliability diagram and a
risk–coverage curve as PNG. Weights count in accuracy, NLL and Brier.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ensemble_rm.cli.common import (
    Bars,
    add_ensemble,
    add_json,
    add_pairs,
    open_ensemble,
    read_pairs,
    say,
)

HELP = "measure an ensemble on judged pairs"
EXAMPLE = "  ensemble-rm evaluate runs/hh --data test.jsonl --report report/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_pairs(parser, "judged")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="of the pictures, the table and its JSON"
    )
    parser.add_argument("--draws", type=int, default=500, metavar="N", help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    pairs = read_pairs(args.data, skip_bad=args.skip_bad)
    from ensemble_rm.evaluation.evaluation import evaluate
    from ensemble_rm.evaluation.report import evaluation_text

    with Bars(quiet=args.json) as bars:
        evaluation = evaluate(
            open_ensemble(args), pairs, draws=args.draws, seed=args.seed, progress=bars
        )
    found, text = evaluation.to_json(), evaluation_text(evaluation)
    if args.report is not None:
        from ensemble_rm.evaluation.report import draw_evaluation

        pictures = draw_evaluation(evaluation, args.report)
        (args.report / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.report / "evaluation.txt").write_text(text + "\n", encoding="utf-8")
        found["pictures"] = [str(path) for path in pictures]
        text += "\n" + "\n".join(str(path) for path in pictures)
    say(args, found, text)
