"""Make DPO pairs of n samples a prompt: one JSON line a pair that the ensemble is sure enough of.

A sample is a row with `prompt` (text or messages) and `completion`; a prompt's rows may lie apart.
The rows are TRL's: prompt, chosen, rejected; beside them stand the calibrated probability and both
rewards. TRL takes no soft label of a row: `label_smoothing` in the report is the share of kept
pairs that are expected to be wrong, for its option of that name.
"""

from __future__ import annotations

import argparse

import numpy as np

from ensemble_rm.cli.common import (
    Bars,
    add_dry_run,
    add_ensemble,
    add_json,
    add_out_file,
    add_rows,
    check_can_write,
    open_ensemble,
    say,
    write_jsonl,
)

HELP = "make DPO pairs of several samples a prompt"
EXAMPLE = (
    "  ensemble-rm make-pairs runs/hh --data samples.jsonl --threshold 0.8 --out dpo_pairs.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_rows(parser, "samples")
    add_out_file(parser, "pairs")
    parser.add_argument(
        "--threshold", type=float, default=0.8, metavar="P", help="the least probability; 0.8"
    )
    parser.add_argument(
        "--per-prompt", type=int, default=1, metavar="N", help="the most pairs of a prompt; 1"
    )
    parser.add_argument(
        "--soft", action="store_true", help="write votes, the soft labels of ensemble-rm train"
    )
    add_dry_run(parser, "report what would be made, and write nothing")
    add_json(parser, rows=True)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if not args.dry_run:
        check_can_write(args.out)
    from ensemble_rm.best_of_n.sampling import make_pairs
    from ensemble_rm.data.loading import read_samples
    from ensemble_rm.data.samples import prompt_key

    samples = list(read_samples(args.data))
    ensemble = open_ensemble(args)
    with Bars(quiet=args.json) as bars:
        pairs = make_pairs(
            ensemble,
            samples,
            threshold=args.threshold,
            per_prompt=args.per_prompt,
            progress=bars,
        )
    if not args.dry_run:
        write_jsonl(args.out, (pair.to_json(soft=args.soft) for pair in pairs))
    if args.out is None and not args.dry_run:
        return
    wrong = 1 - float(np.mean([pair.probability for pair in pairs])) if pairs else None
    prompts = len({prompt_key(sample.prompt) for sample in samples})
    found = {
        "samples": len(samples),
        "prompts": prompts,
        "pairs": len(pairs),
        "threshold": args.threshold,
        "label_smoothing": wrong,
        "out": None if args.dry_run else str(args.out),
    }
    expected = "" if wrong is None else f"; label_smoothing={wrong:.3f} expects that many wrong"
    place = "would be made" if args.dry_run else f"in {args.out}"
    say(
        args,
        found,
        f"{len(pairs)} pairs {place}, of {len(samples)} samples of {prompts} prompts, each "
        f"preferred with at least {args.threshold}{expected}",
    )
