"""Let jobs publish again; the version that was pinned stays current until one does."""

from __future__ import annotations

import argparse

from ensemble_rm.cli.common import add_json, say
from ensemble_rm.cli.jobs import add_run
from ensemble_rm.cli.versions import describe

HELP = "let jobs publish again"
EXAMPLE = "  ensemble-rm unpin runs/hh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.versions.repository import Versions

    found = Versions(args.folder).unpin()
    say(args, found.to_json(), f"current: {describe(found)}")
