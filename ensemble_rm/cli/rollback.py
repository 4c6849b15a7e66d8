"""Make an earlier version current; later ones stay, and jobs go on from the earlier one."""

from __future__ import annotations

import argparse
from pathlib import Path

from ensemble_rm.cli.common import add_json, say
from ensemble_rm.cli.versions import describe

HELP = "go back to an earlier version"
EXAMPLE = "  ensemble-rm rollback runs/hh\n  ensemble-rm rollback runs/hh --to 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a saved ensemble's folder")
    parser.add_argument("--to", type=int, metavar="N", help="the current one's parent by default")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.versions.repository import Versions

    found = Versions(args.folder).rollback(args.to)
    say(args, found.to_json(), f"current: {describe(found)}")
