"""What the commands of run folders and judgments share: options, times, exit codes, loading."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from datetime import datetime

    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

CODES = {"published": 0, "kept": 10, "too few": 11, "drift alarm": 12}


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the run folder."""
    parser.add_argument("folder", type=Path, metavar="RUN", help="a saved ensemble's folder")


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add --judgments."""
    parser.add_argument(
        "--judgments",
        required=True,
        metavar="STORE",
        help="a file, or postgresql://user@host/name",
    )


def add_times(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, *, window: bool = False
) -> None:
    """Add --since and --until, and --window instead of --since where a job takes one."""
    since = parser.add_mutually_exclusive_group()
    since.add_argument("--since", metavar="TIME", help="judged at or after; ISO 8601, UTC")
    if window:
        since.add_argument(
            "--window", type=read_days, metavar="DAYS", help="such as 180d, back from the newest"
        )
    parser.add_argument("--until", metavar="TIME", help="judged before")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add --backbone, --device and --wait."""
    parser.add_argument("--backbone", metavar="NAME", help="where it lies now, if not where it was")
    parser.add_argument("--device", help="cuda, mps or cpu; the best available by default")
    parser.add_argument("--wait", action="store_true", help="for another job on RUN to end")


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


def load_version(
    folder: Path, *, version: int | None = None, backbone: str | None, device: str | None
) -> RewardEnsemble:
    """Load an ensemble whose pairs have to be scored; remote members get their tokens."""
    from ensemble_rm.cli.tokens import with_tokens
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

    options: dict[str, Any] = {"version": version, "backbone": backbone, "device": device}
    return with_tokens(RewardEnsemble.from_pretrained(folder, **options))
