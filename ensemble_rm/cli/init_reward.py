"""Write the file that an RL loop takes its reward from: trl, openrlhf or verl.

The file names the ensemble, its version, its device and its aggregator, and is meant to be read and
changed. It pins the version: a changed ensemble in that folder is an error, never a new reward.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ensemble_rm.cli.common import (
    add_aggregator,
    add_dry_run,
    add_json,
    read_aggregator,
    say,
)
from ensemble_rm.errors import OptionError

HELP = "write an RL loop's reward file"
EXAMPLE = (
    "  ensemble-rm init-reward trl runs/hh --device cuda --aggregator lcb --kappa 1.0 "
    "--out hh_reward.py"
)
LOOPS = ("trl", "openrlhf", "verl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("loop", choices=LOOPS, help="whose reward file")
    parser.add_argument("ensemble", type=Path, metavar="ENSEMBLE", help="a saved ensemble's folder")
    parser.add_argument(
        "--device", required=True, help="where members run: cpu, cuda (each rank's own) or cuda:1"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a new .py file")
    add_aggregator(parser)
    add_dry_run(parser, "print the file, and write nothing")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    aggregator = read_aggregator(args)
    out: Path = args.out
    if out.suffix != ".py" or not out.stem.isidentifier():
        raise OptionError(f"--out must be a Python module's file, such as reward.py, not {out}")
    if out.exists() and not args.dry_run:
        raise OptionError(f"{out} exists; name another file, or remove it")
    from ensemble_rm.rl.pinned import folder_digest
    from ensemble_rm.rl.templates import render

    folder = args.ensemble.expanduser().absolute()
    digest = folder_digest(folder)
    text = render(
        args.loop,
        folder=str(folder),
        digest=digest,
        device=args.device,
        aggregator=aggregator,
        file_name=out.name,
    )
    if not args.dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    found = {"loop": args.loop, "out": str(out), "digest": digest, "written": not args.dry_run}
    shown = text if args.dry_run else f"{out}: the reward of version {digest[:12]} for {args.loop}"
    say(args, found | ({"text": text} if args.dry_run else {}), shown)
