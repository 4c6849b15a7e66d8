"""Look whether the published ensemble has drifted: by judgments, by scores, by its raters.

Three answers, never one number: whether the temperature still fits fresh judgments (a sequential
test of the version's life), whether scores look as they did when it was published, whether an
anchor set is still judged as it was. Exit code 12 where any of them alarms.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from ensemble_rm.cli.common import Bars, add_dry_run, add_json, say
from ensemble_rm.cli.jobs import (
    CODES,
    add_loading,
    add_run,
    add_store,
    add_times,
    load_version,
    read_time,
)

HELP = "look for drift since the current version"
EXAMPLE = (
    "  ensemble-rm drift runs/hh --judgments judgments.db --anchors anchors --report drift.png"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run(parser)
    add_store(parser)
    add_times(parser, window=True)
    parser.add_argument(
        "--alpha", type=float, default=0.05, metavar="P", help="any alarm, where nothing drifts"
    )
    parser.add_argument(
        "--looks", type=int, default=12, metavar="N", help="at one version, which share alpha"
    )
    parser.add_argument(
        "--anchors",
        action="append",
        default=[],
        metavar="BATCH",
        help="a batch of judgments of the anchor set; as often as needed",
    )
    parser.add_argument("--report", type=Path, metavar="PNG", help="draw every look so far")
    add_loading(parser)
    add_dry_run(parser, "keep neither the test's state nor the look")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return 12 on an alarm."""
    from ensemble_rm.drift.check import DriftCheckOptions, check_drift, past_checks
    from ensemble_rm.drift.plots import draw_drift, drift_text
    from ensemble_rm.judgments.store import JudgmentStore

    with (
        JudgmentStore.open(args.judgments, read_only=True) as store,
        Bars(quiet=args.json) as bars,
    ):
        report = check_drift(
            args.folder,
            store,
            options=DriftCheckOptions(
                since=read_time(args.since, "--since"),
                until=read_time(args.until, "--until"),
                window=args.window,
                alpha=args.alpha,
                checks=args.looks,
                anchors=tuple(args.anchors),
                dry_run=args.dry_run,
                wait=args.wait,
            ),
            load=partial(load_version, backbone=args.backbone, device=args.device),
            progress=bars,
        )
    if args.report is not None:
        past = past_checks(args.folder)
        draw_drift([*past, report] if args.dry_run else past, args.report)
    code = CODES["drift alarm"] if report.alarms else 0
    said = report.to_json() | {"alarms": list(report.alarms), "exit_code": code}
    say(args, said, drift_text(report))
    return code
