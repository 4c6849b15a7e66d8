"""Fit the published ensemble's temperature on fresh judgments, and publish it if it is better.

RUN is a saved ensemble's folder; its first recalibration makes it version 1. Without better
judgments the version that is current stays, and the reason is said: exit codes 10 to 13 are for
that. The same judgments twice publish once. Every run is a line in RUN/audit.jsonl.
"""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_rm.cli.common import Bars, add_dry_run, add_json, say
from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from datetime import datetime

    from ensemble_rm.ensemble import RewardEnsemble

HELP = "fit on fresh judgments, publish if better"
EXAMPLE = "  ensemble-rm recalibrate runs/hh --judgments judgments.db --window 180d --half-life 60d"
CODES = {"published": 0, "kept": 10, "too few": 11, "drift alarm": 12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a saved ensemble's folder")
    parser.add_argument(
        "--judgments",
        required=True,
        metavar="STORE",
        help="a file, or postgresql://user@host/name",
    )
    window = parser.add_mutually_exclusive_group()
    window.add_argument("--since", metavar="TIME", help="judged at or after; ISO 8601, UTC")
    window.add_argument(
        "--window", type=read_days, metavar="DAYS", help="such as 180d, back from the newest"
    )
    parser.add_argument("--until", metavar="TIME", help="judged before")
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
    parser.add_argument("--backbone", metavar="NAME", help="where it lies now, if not where it was")
    parser.add_argument("--device", help="cuda, mps or cpu; the best available by default")
    parser.add_argument("--wait", action="store_true", help="for another job on RUN to end")
    add_dry_run(parser, "say everything, write nothing")
    add_json(parser)


def read_days(text: str) -> float:
    """Read ``180d`` or ``180``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)d?", text.strip())
    if found is None or not float(found[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days, such as 180d")
    return float(found[1])


def read_time(text: str | None, option: str) -> datetime | None:
    """Read a date or a time, in UTC where it names no offset."""
    from ensemble_rm.errors import DataError
    from ensemble_rm.judgments.judgment import parse_time

    try:
        return None if text is None else parse_time(text, assume_utc=True)
    except DataError as error:
        raise OptionError(f"{option}: {error}") from None


def run(args: argparse.Namespace) -> int:
    """Run the command; return the verdict's exit code."""
    from ensemble_rm.judgments.store import JudgmentStore
    from ensemble_rm.recalibration.decision import GateOptions
    from ensemble_rm.recalibration.job import recalibrate

    options = GateOptions(
        half_life=args.half_life,
        share=args.gate_share,
        delta=args.delta,
        min_judgments=args.min_judgments,
        slices=args.slices,
    )
    bounds = {name: read_time(getattr(args, name), f"--{name}") for name in ("since", "until")}
    with (
        JudgmentStore.open(args.judgments, read_only=True) as store,
        Bars(quiet=args.json) as bars,
    ):
        found = recalibrate(
            args.folder,
            store,
            since=bounds["since"],
            until=bounds["until"],
            window=args.window,
            options=options,
            dry_run=args.dry_run,
            wait=args.wait,
            load=partial(load_version, backbone=args.backbone, device=args.device),
            progress=bars,
        )
    code = CODES[found.verdict]
    say(args, found.to_json() | {"exit_code": code}, str(found))
    return code


def load_version(
    folder: Path, *, version: int | None = None, backbone: str | None, device: str | None
) -> RewardEnsemble:
    """Load an ensemble whose pairs have to be scored."""
    from ensemble_rm.ensemble import RewardEnsemble

    return RewardEnsemble.from_pretrained(folder, version=version, backbone=backbone, device=device)
