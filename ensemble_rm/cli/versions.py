"""List the versions of an ensemble and its calibrations, and say which one is current."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.common import add_json, say
from ensemble_rm.cli.jobs import add_run

if TYPE_CHECKING:
    from ensemble_rm.versions.version import Version

HELP = "list the versions of an ensemble"
EXAMPLE = "  ensemble-rm versions runs/hh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.versions.repository import Versions

    versions = Versions(args.folder)
    if not versions.versioned:
        first = versions.incumbent()  # a named error where there is no ensemble at all
        said: dict[str, Any] = {"versions": [], "current": None, "pinned": False}
        text = "no versions yet: a plain ensemble, which its first recalibration makes version 1"
        say(args, said, f"{text}\n{describe(first)}")
        return
    pointer, found = versions.pointer, versions.all()
    said = {
        "versions": [one.to_json() for one in found],
        "current": pointer.version,
        "pinned": pointer.pinned,
    }
    lines = []
    for one in found:
        mark = "  "
        if one.number == pointer.version:
            mark = "p " if pointer.pinned else "* "
        lines.append(mark + describe(one))
    lines.append("* is current" if not pointer.pinned else "p is current, and pinned")
    say(args, said, "\n".join(lines))


def describe(version: Version) -> str:
    """Say a version in a line."""
    calibration = version.read_calibration()
    what = "no calibration"
    if calibration is not None:
        fit = calibration.fit
        what = (
            f"{calibration.aggregator}, T = {fit.temperature:.4f} [{fit.low:.4f}, {fit.high:.4f}] "
            f"from {fit.judgments} judgments"
        )
    of = f" of ensemble {version.ensemble}" if version.kind == "calibration" else ""
    return f"{version.number:4d}  {version.created_at}  {version.kind}{of}: {what}"
