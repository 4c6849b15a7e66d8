"""Fit the published ensemble's temperature on fresh judgments, and publish it if it is better.

RUN is a saved ensemble's folder; its first recalibration makes it version 1. Without better
judgments the version that is current stays, and the reason is said: exit codes 10 to 13 are for
that. The same judgments twice publish once. Every run is a line in RUN/audit.jsonl.
"""

from __future__ import annotations

import argparse
from functools import partial

from ensemble_rm.cli.common import Bars, add_dry_run, add_json, say
from ensemble_rm.cli.jobs import (
    CODES,
    add_loading,
    add_run,
    add_store,
    add_times,
    load_version,
    read_days,
    read_time,
)

HELP = "fit on fresh judgments, publish if better"
EXAMPLE = "  ensemble-rm recalibrate runs/hh --judgments judgments.db --window 180d --half-life 60d"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run(parser)
    add_store(parser)
    add_times(parser, window=True)
    parser.add_argument(
        "--half-life", type=read_days, metavar="DAYS", help="after which a judgment counts half"
    )
    parser.add_argument(
        "--delta", type=float, default=0.005, metavar="NATS", help="loss that must be excluded"
    )
    parser.add_argument(
        "--gate-share", type=float, default=1 / 6, metavar="X", help="newest part, for the gate"
    )
    parser.add_argument("--min-judgments", type=int, default=50, metavar="N")
    parser.add_argument("--slices", action="store_true", help="one temperature a subset, too")
    add_loading(parser)
    add_dry_run(parser, "say everything, write nothing")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the verdict's exit code."""
    from ensemble_rm.judgments.store import JudgmentStore
    from ensemble_rm.recalibration.job import RecalibrationOptions, recalibrate

    options = RecalibrationOptions(
        since=read_time(args.since, "--since"),
        until=read_time(args.until, "--until"),
        window=args.window,
        half_life=args.half_life,
        gate_share=args.gate_share,
        delta=args.delta,
        min_judgments=args.min_judgments,
        slices=args.slices,
        dry_run=args.dry_run,
        wait=args.wait,
    )
    with (
        JudgmentStore.open(args.judgments, read_only=True) as store,
        Bars(quiet=args.json) as bars,
    ):
        found = recalibrate(
            args.folder,
            store,
            options=options,
            load=partial(load_version, backbone=args.backbone, device=args.device),
            progress=bars,
        )
    code = CODES[found.verdict]
    say(args, found.to_json() | {"exit_code": code}, str(found))
    return code
