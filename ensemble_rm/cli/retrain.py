"""Train the published ensemble's members on, on new judgments, and publish them if they are better.

RUN is a saved ensemble's folder; its first version is the ensemble as it is. Members go on from
their weights on the old pairs and the new judgments; the newest prompts decide by NLL and accuracy.
The reward keeps the spread that it had on the reference completions. Where the gate says no, the
current version stays, and the reason is said: exit codes 10, 11 and 13 are for that. `ensemble-rm
rollback RUN` goes back. Every run is a line in RUN/audit.jsonl.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_rm.cli.common import Bars, add_dry_run, add_json, add_pairs, read_pairs, say
from ensemble_rm.cli.jobs import (
    CODES,
    add_loading,
    add_run,
    add_store,
    add_times,
    load_version,
    read_time,
)

if TYPE_CHECKING:
    from ensemble_rm.members.learning.recipe import Recipe
    from ensemble_rm.retraining.job import RetrainingRunOptions

HELP = "train the members on new judgments, publish if better"
EXAMPLE = (
    "  ensemble-rm retrain runs/hh --data runs/hh.parts/train.jsonl --judgments judgments.db \\\n"
    "      --reference runs/hh.parts/validation.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_run(parser)
    add_pairs(parser, "the members' old")
    add_store(parser)
    add_times(parser)
    parser.add_argument(
        "--reference",
        metavar="FILE",
        help="pairs on whose completions the reward's spread stays what it was; --data by default",
    )
    gate = parser.add_argument_group("gate")
    gate.add_argument("--gate-share", type=float, default=0.25, metavar="X", help="newest; 0.25")
    gate.add_argument("--calibration-share", type=float, default=0.25, metavar="X", help="0.25")
    gate.add_argument(
        "--delta", type=float, default=0.02, metavar="NATS", help="rise of NLL to exclude; 0.02"
    )
    gate.add_argument(
        "--delta-accuracy", type=float, default=0.05, metavar="X", help="fall to exclude; 0.05"
    )
    gate.add_argument("--min-judgments", type=int, default=50, metavar="N", help="effective; 50")
    how = parser.add_argument_group("training (as the members were trained, where not given)")
    how.add_argument("--validation-share", type=float, default=0.15, metavar="X", help="0.15")
    how.add_argument(
        "--weighted", action="store_true", help="train with the weights 1/π of selected pairs, too"
    )
    how.add_argument("--epochs", type=int)
    how.add_argument("--patience", type=int)
    how.add_argument("--learning-rate", type=float)
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--cache-dir", type=Path, metavar="FOLDER", help="of features and states")
    add_loading(parser)
    add_dry_run(parser, "deal the judgments and say so; train and write nothing")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the verdict's exit code."""
    from ensemble_rm.judgments.store import JudgmentStore
    from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
    from ensemble_rm.retraining.job import retrain_run

    old = read_pairs(args.data, skip_bad=args.skip_bad)
    reference = None
    if args.reference is not None:
        reference = read_pairs(args.reference, skip_bad=args.skip_bad)
    with (
        JudgmentStore.open(args.judgments, read_only=True) as store,
        Bars(quiet=args.json) as bars,
    ):
        found = retrain_run(
            args.folder,
            old,
            store,
            reference=reference,
            recipe=_recipe(args),
            options=_options(args),
            load=partial(load_version, backbone=args.backbone, device=args.device),
            cache_dir=args.cache_dir or DEFAULT_CACHE,
            progress=bars,
        )
    code = CODES[found.verdict]
    say(args, found.to_json() | {"exit_code": code}, str(found))
    return code


def _options(args: argparse.Namespace) -> RetrainingRunOptions:
    from ensemble_rm.retraining.job import RetrainingRunOptions

    return RetrainingRunOptions(
        since=read_time(args.since, "--since"),
        until=read_time(args.until, "--until"),
        dry_run=args.dry_run,
        wait=args.wait,
        gate_share=args.gate_share,
        calibration_share=args.calibration_share,
        validation_share=args.validation_share,
        weighted=args.weighted,
        delta=args.delta,
        delta_accuracy=args.delta_accuracy,
        min_judgments=args.min_judgments,
        seed=args.seed,
    )


def _recipe(args: argparse.Namespace) -> Recipe | None:
    """Return the ensemble's own recipe with what was asked for; None where nothing was."""
    given = {
        name: value
        for name in ("epochs", "patience", "learning_rate")
        if (value := getattr(args, name)) is not None
    }
    if not given:
        return None
    from dataclasses import replace

    from ensemble_rm.training.request import TrainingRequest

    ensemble = load_version(args.folder, backbone=args.backbone, device=args.device)
    return replace(TrainingRequest.of(ensemble).recipe, **given)
