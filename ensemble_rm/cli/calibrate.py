"""Fit how a reward becomes a probability, on human judgments that no member was trained on.

The temperature is fitted under every method. Isotonic regression, histograms and BBQ make ties,
which are counted; the reward itself is the same under every method.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_rm.cli.common import (
    Bars,
    add_aggregator,
    add_dry_run,
    add_ensemble,
    add_json,
    add_pairs,
    open_ensemble,
    read_aggregator,
    read_pairs,
    say,
)

if TYPE_CHECKING:
    from ensemble_rm.calibration.calibration import Calibration

HELP = "fit the temperature on judgments held apart"
EXAMPLE = "  ensemble-rm calibrate runs/hh --data judgments.jsonl --aggregator lcb --kappa 1.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_pairs(parser, "judged")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="the calibrated ensemble's; ENSEMBLE by default"
    )
    parser.add_argument(
        "--method",
        default="temperature",
        metavar="NAME",
        help="temperature (default), power, isotonic, histogram or bbq",
    )
    parser.add_argument(
        "--slices", action="store_true", help="one temperature a subset, shrunk to the global one"
    )
    parser.add_argument(
        "--ties", metavar="NAME", help="model ties as an outcome: davidson or rao-kupper"
    )
    parser.add_argument("--min-judgments", type=int, default=50, metavar="N")
    add_aggregator(parser)
    add_dry_run(parser, "fit and show, save nothing")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from ensemble_rm.data.weights import sample_weights
    from ensemble_rm.ensemble.storage import check_target

    out = args.out or args.ensemble
    if not args.dry_run:
        check_target(out)
    aggregator = read_aggregator(args)
    judgments = read_pairs(args.data, skip_bad=args.skip_bad)
    with Bars(quiet=args.json) as bars:
        ensemble = open_ensemble(args).calibrate(
            judgments,
            aggregator=aggregator,
            method=args.method,
            slices=args.slices,
            ties=args.ties,
            min_judgments=args.min_judgments,
            progress=bars,
        )
    calibration = ensemble.calibration
    assert calibration is not None
    fit = calibration.fit
    if not args.dry_run:
        ensemble.save_pretrained(out)
    saved = "nothing saved (--dry-run)" if args.dry_run else f"saved in {out}"
    weights = sample_weights(judgments.weights)
    found = {
        "aggregator": str(ensemble.aggregator),
        "effective_judgments": weights.effective,
        "fit": asdict(fit),
        "dry_run": args.dry_run,
        "mixture_temperature": calibration.mixture_temperature,
        "out": str(out),
        "method": calibration.method,
        "ties": calibration.ties,
        "tie_model": None if calibration.tie_model is None else calibration.tie_model.to_json(),
        "slices": [one.to_json() for one in calibration.slices],
    }
    line = (
        f"{ensemble.aggregator}: T = {fit.temperature:.3f} [{fit.low:.3f}, {fit.high:.3f}] from "
        f"{fit.judgments} judgments of {fit.prompts} prompts, NLL {fit.nll:.4f}; {saved}"
    )
    if weights.effective < len(judgments) - 0.05:
        line += f"\n  {weights.remark}"
    say(args, found, "\n".join([line, *_details(calibration)]))


def _details(calibration: Calibration) -> list[str]:
    lines = []
    if calibration.method != "temperature":
        lines.append(
            f"  probabilities by {calibration.method}; it makes {calibration.ties} ties among the "
            "judgments' margins" + (": not for an RL reward" if calibration.ties else "")
        )
    if (ties := calibration.tie_model) is not None:
        lines.append(
            f"  ties by {ties.model}: ν = {ties.nu:.3f} [{ties.nu_low:.3f}, {ties.nu_high:.3f}], "
            f"T = {ties.temperature:.3f}; {ties.tie_share:.1%} of the judgments are ties"
        )
    for one in calibration.slices:
        own = f"no own fit: {one.refusal}"
        if one.own is not None:
            own = (
                f"own {one.own.temperature:.3f} of {one.own.judgments}, {one.share:.0%} of it kept"
            )
        lines.append(f"  {one.name}: T = {one.temperature:.3f} ({own})")
    return lines
