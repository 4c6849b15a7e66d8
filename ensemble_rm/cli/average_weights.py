"""Average the weights of an ensemble's members: one model at a single model's price.

The members must be of kind full or branch, from one run. The completions of the reference pairs set
the new member's offset and scale. One member knows no uncertainty: its aggregator is the mean.
"""

from __future__ import annotations

import argparse

from ensemble_rm.cli.common import (
    Bars,
    add_json,
    add_out_folder,
    add_pairs,
    add_saved,
    open_ensemble,
    read_pairs,
    say,
)

HELP = "average the members' weights into one model"
EXAMPLE = (
    "  ensemble-rm average-weights runs/hh --data runs/hh.parts/validation.jsonl --out runs/mean"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_saved(parser)
    add_pairs(parser, "reference")
    add_out_folder(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    pairs = read_pairs(args.data, skip_bad=args.skip_bad)
    ensemble = open_ensemble(args)
    from ensemble_rm.ensemble.weight_averaging import average_weights

    with Bars(quiet=args.json) as bars:
        merged = average_weights(ensemble, pairs, out=args.out, progress=bars)
    say(
        args,
        {"out": str(args.out), "members": list(ensemble.names)}
        | {"normaliser": merged.normaliser.to_json()},
        f"the mean of {len(ensemble.names)} members in {args.out}: {', '.join(ensemble.names)}",
    )
