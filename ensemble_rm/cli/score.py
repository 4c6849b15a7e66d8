"""Score samples: one JSON line a sample, in the order of the input.

A sample is a row with `prompt` (text or messages) and `completion`, and with `reference` where the
ensemble has a baseline. The file may be larger than memory: it is read, scored and written chunk by
chunk. FILE.partial becomes FILE once every row is there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_rm.cli.common import (
    Bars,
    add_aggregator,
    add_ensemble,
    add_json,
    add_out_file,
    add_rows,
    known,
    open_ensemble,
    read_aggregator,
    say,
    write_jsonl,
)

if TYPE_CHECKING:
    from ensemble_rm.data.samples import Sample
    from ensemble_rm.ensemble.results import Scores
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

HELP = "score samples"
EXAMPLE = (
    "  ensemble-rm score runs/hh --data samples.jsonl --aggregator lcb --kappa 1.0 "
    "--out scores.jsonl"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_ensemble(parser)
    add_rows(parser, "samples")
    add_out_file(parser, "scores")
    parser.add_argument(
        "--chunk", type=int, default=4096, metavar="N", help="samples in memory at once; 4096"
    )
    parser.add_argument(
        "--score-cache",
        type=Path,
        metavar="FOLDER",
        help="keep raw scores here, and read those that are there",
    )
    add_aggregator(parser)
    add_json(parser, rows=True)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    aggregator = read_aggregator(args)
    from ensemble_rm.data.loading import read_samples

    samples = read_samples(args.data)
    first = list(islice(samples, 1))  # a file that cannot be read is named before models are
    ensemble = open_ensemble(args)
    if aggregator is not None:
        ensemble = ensemble.with_aggregator(aggregator)
    if args.score_cache is not None:
        from ensemble_rm.scoring.score_cache import ScoreCache

        ensemble = ensemble.with_score_cache(ScoreCache(args.score_cache))
    count: Counter[str] = Counter()
    with Bars(quiet=args.json) as bars:
        write_jsonl(args.out, score_rows(ensemble, chain(first, samples), args.chunk, bars, count))
    if args.out is not None:
        cut = {name: count[name] for name in ("prompts_cut", "completions_cut")}
        say(
            args,
            {"samples": count["rows"], "out": str(args.out), "members": list(ensemble.names)}
            | {"aggregator": str(ensemble.aggregator), **cut},
            f"{count['rows']} samples in {args.out} by {ensemble.aggregator}; "
            f"{cut['prompts_cut']} lost part of the prompt, "
            f"{cut['completions_cut']} of the completion",
        )


def score_rows(
    ensemble: RewardEnsemble,
    samples: Iterable[Sample],
    chunk: int,
    bars: Bars,
    count: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Return every sample's row, and count rows and cuts as they pass."""
    from ensemble_rm.ensemble.streaming import stream_scores

    for scores in stream_scores(ensemble, samples, chunk=chunk, progress=bars):
        count.update(scores.truncation.to_json())
        count["rows"] += len(scores.reward)
        yield from _rows(scores)


def _rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """Return a row a sample; a member without a score is null, and so is the spread of one."""
    several = len(scores.names) > 1
    std = scores.std if several else ()
    for i, reward in enumerate(scores.reward):
        members = [known(score) for score in scores.members[i].tolist()]
        row: dict[str, Any] = {
            "reward": float(reward),
            "members": dict(zip(scores.names, members, strict=True)),
        }
        if several:
            row["std"] = known(float(std[i]))
        yield row
