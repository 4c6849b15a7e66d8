"""Say with what probability a human prefers each first completion: one JSON line a pair.

A pair is a row with `prompt` (text or messages), `first` and `second`; `chosen` and `rejected` are
read as first and second. Its `subset` picks the slice's temperature where the calibration has
slices; its `reference` is needed where the ensemble has a baseline.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ensemble_rm.cli.common import (
    Bars,
    add_ensemble,
    add_json,
    add_out_file,
    add_rows,
    check_can_write,
    known,
    open_ensemble,
    say,
    write_jsonl,
)

if TYPE_CHECKING:
    from ensemble_rm.ensemble.results import Comparison

HELP = "compare pairs of completions"
EXAMPLE = "  ensemble-rm compare runs/hh --data pairs.jsonl --out verdicts.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_rows(parser, "pairs")
    add_out_file(parser, "verdicts")
    add_json(parser, rows=True)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    check_can_write(args.out)
    from ensemble_rm.data.loading import read_comparisons

    pairs = read_comparisons(args.data)
    ensemble = open_ensemble(args)
    with Bars(quiet=args.json) as bars:
        verdict = ensemble.compare(
            [pair.prompt for pair in pairs],
            [pair.chosen for pair in pairs],
            [pair.rejected for pair in pairs],
            subsets=pairs.subsets,
            references=[pair.reference for pair in pairs],
            progress=bars,
        )
    write_jsonl(args.out, _rows(verdict, several=len(ensemble.names) > 1))
    if args.out is not None:
        found = {"pairs": len(pairs), "out": str(args.out), "aggregator": str(ensemble.aggregator)}
        say(args, found, f"{len(pairs)} pairs in {args.out} by {ensemble.aggregator}")


def _rows(verdict: Comparison, *, several: bool) -> Iterator[dict[str, float | None]]:
    for i in range(len(verdict.probability)):
        row: dict[str, float | None] = {
            "probability": float(verdict.probability[i]),
            "margin": float(verdict.margin[i]),
        }
        if verdict.tie_probability is not None:
            row["tie_probability"] = float(verdict.tie_probability[i])
        if several:
            row |= {
                "mixture_probability": known(verdict.mixture_probability[i]),
                "total": known(verdict.total[i]),
                "aleatoric": known(verdict.aleatoric[i]),
                "epistemic": known(verdict.epistemic[i]),
            }
        yield row
