"""Pick from unjudged pairs those worth a human's time, each with its inclusion probability.

A pair is a row with `prompt` (text or messages), `first` and `second`, and optionally `id` and
`subset`. What is written has the sides in random order, and goes to Label Studio, to Argilla, or
to a tool of one's own as JSONL; `ensemble-rm judgments import` reads back what annotators answered.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.common import (
    Bars,
    add_dry_run,
    add_ensemble,
    add_json,
    check_can_write,
    open_ensemble,
    say,
    scratch_of,
    write_jsonl,
)

if TYPE_CHECKING:
    from ensemble_rm.active_learning.selection import SelectedPairs

HELP = "pick the unjudged pairs that a human should judge"
EXAMPLE = (
    "  ensemble-rm select runs/hh --pool pairs.jsonl --budget 200 --strategy bald \\\n"
    "      --format label-studio --out tasks.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    parser.add_argument(
        "--pool", required=True, metavar="FILE", help="unjudged pairs as JSONL (.gz too)"
    )
    parser.add_argument("--budget", type=int, required=True, metavar="N", help="pairs to pick")
    parser.add_argument(
        "--strategy",
        choices=["bald", "margin", "disagreement", "random"],
        default="bald",
        help="members' mutual information (default), smallest margin, std of members' margins, or "
        "none of them",
    )
    parser.add_argument(
        "--random-share",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="expected share of draws that the strategy does not decide; 0.3",
    )
    parser.add_argument(
        "--max-per-prompt", type=int, default=1, metavar="N", help="pairs of one prompt; 1"
    )
    parser.add_argument(
        "--sharpness",
        type=float,
        default=1.0,
        metavar="X",
        help="how steeply the probability rises with the utility's rank; 1, and 0 is random",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw and the sides; 0")
    parser.add_argument("--format", choices=["label-studio", "argilla", "jsonl"], default="jsonl")
    parser.add_argument("--batch", metavar="NAME", help="the batch of annotation, kept with each")
    parser.add_argument("--policy", metavar="NAME", help="what wrote the completions, kept, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="standard output by default")
    parser.add_argument(
        "--chunk", type=int, default=4096, metavar="N", help="samples in memory at once; 4096"
    )
    add_dry_run(parser, "pick and say, write nothing")
    add_json(parser, rows=True)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if not args.dry_run:
        check_can_write(args.out)
    from ensemble_rm.active_learning.selection import select_pairs
    from ensemble_rm.active_learning.tasks import to_tasks
    from ensemble_rm.data.loading import read_comparisons

    pool = read_comparisons(args.pool)
    with Bars(quiet=args.json) as bars:
        selected = select_pairs(
            None if args.strategy == "random" else open_ensemble(args),
            pool,
            budget=args.budget,
            strategy=args.strategy,
            random_share=args.random_share,
            max_per_prompt=args.max_per_prompt,
            sharpness=args.sharpness,
            seed=args.seed,
            chunk=args.chunk,
            progress=bars,
        )
    tasks = to_tasks(selected, args.format, batch=args.batch, policy=args.policy)
    if not args.dry_run:
        write_tasks(args.out, args.format, tasks)
    if args.out is not None or args.dry_run:
        say(args, _found(args, selected), _text(args, selected))


def write_tasks(path: Path | None, form: str, tasks: list[dict[str, Any]]) -> None:
    """Write lines, or one array as the tools' own import reads it."""
    if form == "jsonl":
        write_jsonl(path, tasks)
    elif path is None:
        print(json.dumps(tasks, ensure_ascii=False, indent=1))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = scratch_of(path)
        scratch.write_text(json.dumps(tasks, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)


def _found(args: argparse.Namespace, selected: SelectedPairs) -> dict[str, Any]:
    weights = selected.weights
    return {
        "selected": len(selected),
        "strategy": args.strategy,
        "random_share": args.random_share,
        "pool": selected.pool,
        "prompts": selected.prompts,
        "repeated": selected.repeated,
        "equal_sides": selected.equal_sides,
        "inclusion_floor": selected.floor,
        "effective": weights.effective,
        "seed": selected.seed,
        "format": args.format,
        "out": None if args.out is None else str(args.out),
        "dry_run": args.dry_run,
    }


def _text(args: argparse.Namespace, selected: SelectedPairs) -> str:
    written = "nothing written (--dry-run)" if args.dry_run else f"written to {args.out}"
    return (
        f"{len(selected)} of {selected.pool} pairs of {selected.prompts} prompts by "
        f"{args.strategy}; {written}\n"
        f"  left out: {selected.repeated} repeated, {selected.equal_sides} with equal sides\n"
        f"  smallest inclusion probability of the pool {selected.floor:.3g}; "
        f"{selected.weights.remark}"
    )
