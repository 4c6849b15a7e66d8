"""Score samples in float32 and in another dtype, and say what the lower precision does to them.

Drift of every member and of the reward, rank agreement, pairs within a prompt whose order turns or
that become equal.
"""

from __future__ import annotations

import argparse

from ensemble_rm.cli.common import Bars, add_ensemble, add_json, add_rows, open_ensemble, say

HELP = "say what a lower precision does to the scores"
EXAMPLE = "  ensemble-rm precision runs/hh --data samples.jsonl --dtype bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_rows(parser, "samples, several a prompt,")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="the other"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.data.loading import read_samples

    samples = list(read_samples(args.data))
    from ensemble_rm.evaluation.precision import precision_report, precision_text

    with Bars(quiet=args.json) as bars:
        report = precision_report(open_ensemble(args), samples, dtype=args.dtype, progress=bars)
    say(args, report.to_json(), precision_text(report))
