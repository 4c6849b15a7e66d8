"""Fit an ensemble's temperature on human judgments that it was not trained on."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ensemble_rm.cli.common import (
    Bars,
    add_aggregator,
    add_data,
    add_dry_run,
    add_ensemble,
    add_json,
    open_ensemble,
    read_aggregator,
    read_pairs,
    say,
)

HELP = "fit the temperature on judgments held apart"
EXAMPLE = "  ensemble-rm calibrate runs/hh --data judgments.jsonl --aggregator lcb --kappa 1.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_data(parser, "judged pairs: JSONL (.gz too) or a Hub data set")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the calibrated ensemble's; ENSEMBLE by default"
    )
    parser.add_argument("--min-judgments", type=int, default=50, metavar="N")
    add_aggregator(parser)
    add_dry_run(parser, "fit and show, save nothing")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    aggregator = read_aggregator(args)
    judgments = read_pairs(args.data, skip_bad=args.skip_bad)
    with Bars(quiet=args.json) as bars:
        ensemble = open_ensemble(args).calibrate(
            judgments, aggregator=aggregator, min_judgments=args.min_judgments, progress=bars
        )
    assert ensemble.calibration is not None
    fit = ensemble.calibration.fit
    out = args.out or args.ensemble
    if not args.dry_run:
        ensemble.save_pretrained(out)
    saved = "nothing saved (--dry-run)" if args.dry_run else f"saved in {out}"
    say(
        args,
        {"aggregator": str(ensemble.aggregator), "fit": asdict(fit), "dry_run": args.dry_run}
        | {"mixture_temperature": ensemble.calibration.mixture_temperature, "out": str(out)},
        f"{ensemble.aggregator}: T = {fit.temperature:.3f} [{fit.low:.3f}, {fit.high:.3f}] from "
        f"{fit.judgments} judgments of {fit.prompts} prompts, NLL {fit.nll:.4f}; {saved}",
    )
