"""Train several independently seeded reward models on preference pairs.

The pairs are split by prompt into four parts. The first two train the members; the other two are
written beside the ensemble, for `calibrate` and `evaluate`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.common import (
    Bars,
    add_dry_run,
    add_json,
    add_out_folder,
    add_pairs,
    add_text,
    read_pairs,
    read_text_options,
    say,
    write_jsonl,
)
from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.data.samples import Preferences
    from ensemble_rm.members.learning.recipe import Recipe
    from ensemble_rm.training.request import TrainingRequest

HELP = "train an ensemble on preference pairs"
EXAMPLE = (
    "  ensemble-rm train --data pairs.jsonl --backbone HuggingFaceTB/SmolLM2-135M-Instruct \\\n"
    "      --members 5 --out runs/hh"
)
PARTS = ("train", "validation", "calibration", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_pairs(parser, "preference")
    parser.add_argument("--backbone", required=True, metavar="NAME", help="hub id or local folder")
    add_out_folder(parser)
    _add_members(parser)
    parser.add_argument(
        "--split",
        type=float,
        nargs=4,
        default=(0.7, 0.1, 0.1, 0.1),
        metavar="SHARE",
        help="shares of train, validation, calibration and test (default: .7 .1 .1 .1)",
    )
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="subtract the score of each prompt's `reference`; all rows need one",
    )
    text = add_text(parser)
    text.add_argument(
        "--cache-dir", type=Path, metavar="FOLDER", help="of features and token states"
    )
    text.add_argument(
        "--states-limit",
        type=float,
        metavar="GIB",
        help="largest size of the token states that branches are trained on (default: 16)",
    )
    _add_lora(parser)
    _add_recipe(parser)
    add_dry_run(parser, "say what would be done, and stop")
    add_json(parser)


def _add_members(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind",
        choices=["head", "branch", "lora", "full"],
        default="head",
        help="heads over one frozen trunk (default), copies of its top blocks, LoRA adapters on "
        "its blocks, or copies of it all",
    )
    parser.add_argument("--members", type=int, default=5, metavar="K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--view",
        action="append",
        dest="views",
        metavar="LAYER:POOLING",
        help="what a head reads, such as 16:mean; once for all heads, or once a head",
    )
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="M",
        help="top blocks that a branch copies (default: 2) or an adapter changes (default: all)",
    )


def _add_lora(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters (of --kind lora)")
    group.add_argument("--rank", type=int, help="of an adapter's update (default: 16)")
    group.add_argument("--alpha", type=float, help="its scale, over the rank (default: 32)")
    group.add_argument(
        "--target",
        action="append",
        dest="targets",
        metavar="NAME",
        help="a linear layer that is adapted, such as q_proj; repeated; all by default",
    )
    group.add_argument(
        "--warm-start",
        action="store_const",
        const=True,
        help="fit one adapter first, merge it, and let the members start from there",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("recipe (the kind's defaults where not given)")
    how.add_argument("--solver", choices=["convex", "adam"], help="of linear heads")
    how.add_argument(
        "--prior", type=float, nargs="+", help="convex: sd of a margin, in logits; all are tried"
    )
    how.add_argument("--epochs", type=int)
    how.add_argument("--patience", type=int)
    how.add_argument("--learning-rate", type=float)
    how.add_argument("--weight-decay", type=float, nargs="+")
    how.add_argument("--batch-size", type=int)
    how.add_argument("--clip", type=float)
    how.add_argument("--smoothing", type=float, help="label smoothing")
    how.add_argument("--centring", type=float)
    how.add_argument("--hidden", type=int, help="width of the heads' hidden layer; 0 is linear")
    how.add_argument("--subspace", type=float, help="share of features that each linear head sees")
    how.add_argument("--warmup", type=float, help="share of the steps; not of heads")
    how.add_argument(
        "--first-head", choices=["zero", "fitted"], help="where branch and lora heads start"
    )
    how.add_argument(
        "--head-rate",
        type=float,
        help="of branch and lora heads, over --learning-rate (default: 10)",
    )
    how.add_argument("--dropout", type=float, help="of branch, lora and full members' layers")
    how.add_argument(
        "--reinitialise", type=int, metavar="N", help="topmost blocks of a branch that start afresh"
    )
    how.add_argument("--diversity", type=float, help="coefficient that keeps LoRA adapters apart")
    how.add_argument("--bootstrap", action="store_const", const=True, help="resample prompts")
    how.add_argument(
        "--trainer-arg",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="one of transformers' TrainingArguments, for full members: report_to='[\"wandb\"]'",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    pairs = read_pairs(args.data, skip_bad=args.skip_bad)
    parts = dict(zip(PARTS, pairs.split(*args.split, seed=args.seed), strict=True))
    counts = {name: len(part) for name, part in parts.items()}
    request = _request(args)
    from ensemble_rm.scoring.baselines import reference_samples
    from ensemble_rm.training.run import plan, train_request

    if args.baseline:
        reference_samples(parts["validation"].samples())  # before anything is read
    if args.dry_run:
        found = plan(parts["train"], parts["validation"], request)
        shown = "\n".join(f"{name}: {value}" for name, value in (found | counts).items())
        say(args, {"dry_run": True, "parts": counts} | found, shown)
        return
    with Bars(quiet=args.json) as bars:
        ensemble = train_request(parts["train"], parts["validation"], request, progress=bars)
    folder = _write_parts(args.out, parts)
    nll: list[float] = ensemble.provenance["validation_nll"]
    lines = [
        f"  {name}: validation NLL {x:.4f}" for name, x in zip(ensemble.names, nll, strict=True)
    ]
    cut = ensemble.provenance["truncation"]
    say(
        args,
        {"out": str(args.out), "parts": counts, "parts_folder": str(folder), "truncation": cut}
        | {"members": list(ensemble.names), "validation_nll": nll},
        "\n".join(lines),
    )


def _request(args: argparse.Namespace) -> TrainingRequest:
    """Return what the options ask for."""
    from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
    from ensemble_rm.training.request import TrainingRequest

    return TrainingRequest(
        backbone=args.backbone,
        recipe=_recipe(args),
        members=args.members,
        seed=args.seed,
        options=read_text_options(args),
        baseline=args.baseline,
        out=args.out,
        cache_dir=args.cache_dir or DEFAULT_CACHE,
    )


def _recipe(args: argparse.Namespace) -> Recipe:
    from ensemble_rm.members.registry import make_recipe, member_kind, trained_kinds

    names = {
        own.name for kind in trained_kinds() for own in fields(member_kind(kind).recipe_class())
    }
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if args.states_limit is not None:
        given["states_limit"] = int(args.states_limit * 2**30)
    if args.trainer_arg:
        given["trainer_args"] = _trainer_args(args)
    if args.kind != "head" and len(given.get("weight_decay", ())) == 1:
        (given["weight_decay"],) = given["weight_decay"]
    return make_recipe(args.kind, **given)


def _trainer_args(args: argparse.Namespace) -> dict[str, Any]:
    """Read NAME=JSON."""
    found = {}
    for text in args.trainer_arg:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise OptionError(f"--trainer-arg {text}: {value!r} is not JSON ({error})") from error
    return found


def _write_parts(out: Path, parts: dict[str, Preferences]) -> Path:
    folder = out.parent / f"{out.name}.parts"
    for name, part in parts.items():
        write_jsonl(folder / f"{name}.jsonl", (pair.to_json() for pair in part))
    return folder
