"""Make a version current and let no job move it, until `unpin`."""

from __future__ import annotations

import argparse

from ensemble_rm.cli.common import add_json, say
from ensemble_rm.cli.jobs import add_run
from ensemble_rm.cli.versions import describe

HELP = "hold a version against every job"
EXAMPLE = "  ensemble-rm pin runs/hh 2\n  ensemble-rm unpin runs/hh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run(parser)
    parser.add_argument("number", type=int, nargs="?", metavar="N", help="the current by default")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.versions.repository import Versions

    found = Versions(args.folder).pin(args.number)
    say(args, found.to_json(), f"pinned: {describe(found)}")
