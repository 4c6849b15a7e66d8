"""Show one version: its calibration, what it was fitted on, what the gate found, its parent."""

from __future__ import annotations

import argparse
import json

from ensemble_rm.cli.common import add_json, say
from ensemble_rm.cli.jobs import add_run
from ensemble_rm.cli.versions import describe

HELP = "show a version and what it rests on"
EXAMPLE = "  ensemble-rm show runs/hh 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run(parser)
    parser.add_argument("number", type=int, nargs="?", metavar="N", help="the current by default")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.versions.repository import Versions

    versions = Versions(args.folder)
    found = versions.current() if args.number is None else versions.show(args.number)
    said = found.to_json()
    text = json.dumps(said, indent=1, ensure_ascii=False)
    say(args, said, f"{describe(found)}\n{text}")
