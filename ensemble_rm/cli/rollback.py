"""Make an earlier version current; later ones stay, and jobs go on from the earlier one."""

from __future__ import annotations

import argparse

from ensemble_rm.cli.common import add_json, say
from ensemble_rm.cli.jobs import add_run
from ensemble_rm.cli.versions import describe

HELP = "go back to an earlier version"
EXAMPLE = "  ensemble-rm rollback runs/hh\n  ensemble-rm rollback runs/hh --to 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run(parser)
    parser.add_argument("--to", type=int, metavar="N", help="the current one's parent by default")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.versions.repository import Versions

    found = Versions(args.folder).rollback(args.to)
    say(args, found.to_json(), f"current: {describe(found)}")
