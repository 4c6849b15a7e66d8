"""Score samples: one JSON line a sample, in the order of the input.

A sample is a row with `prompt` (text or messages) and `completion`, and with `reference` where the
ensemble has a baseline.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.common import (
    Bars,
    add_aggregator,
    add_ensemble,
    add_json,
    open_ensemble,
    read_aggregator,
    say,
    write_jsonl,
)

if TYPE_CHECKING:
    from ensemble_rm.results import Scores

HELP = "score samples"
EXAMPLE = (
    "  ensemble-rm score runs/hh --data samples.jsonl --aggregator lcb --kappa 1.0 "
    "--out scores.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="samples as JSONL (.gz too)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="of the scores; standard output by default"
    )
    add_aggregator(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    aggregator = read_aggregator(args)
    from ensemble_rm.loading import read_samples

    samples = list(read_samples(args.data))
    ensemble = open_ensemble(args)
    if aggregator is not None:
        ensemble = ensemble.with_aggregator(aggregator)
    with Bars(quiet=args.json) as bars:
        scores = ensemble.score(samples, progress=bars)
    write_jsonl(args.out, _rows(scores))
    if args.out is not None:
        cut = scores.truncation
        say(
            args,
            {"samples": len(samples), "out": str(args.out), "members": list(scores.names)}
            | {"aggregator": str(ensemble.aggregator), "prompts_cut": cut.prompts_cut}
            | {"completions_cut": cut.completions_cut},
            f"{len(samples)} samples in {args.out} by {ensemble.aggregator}; "
            f"{cut.prompts_cut} lost part of the prompt, {cut.completions_cut} of the completion",
        )


def _rows(scores: Scores) -> Iterator[dict[str, Any]]:
    std = scores.std if len(scores.names) > 1 else None
    for i, reward in enumerate(scores.reward):
        row: dict[str, Any] = {
            "reward": float(reward),
            "members": dict(zip(scores.names, scores.members[i].tolist(), strict=True)),
        }
        if std is not None:
            row["std"] = float(std[i])
        yield row
