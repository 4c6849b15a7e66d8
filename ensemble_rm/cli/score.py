"""``ensemble-rm score``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import (
    ENSEMBLE,
    JSON_ROWS,
    AggregatorOptions,
    Loading,
    aggregator_options,
    check_can_write,
    use_aggregator,
    write_jsonl,
)
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import default_of

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console, Progress
    from ensemble_rm.data.samples import Sample
    from ensemble_rm.ensemble.results import Scores
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble


@dataclass(frozen=True, kw_only=True)
class Score(Command):
    """Score samples: one JSON line per sample, in the order of the input.

    A sample is a row with `prompt` (text or messages) and `completion`, and with `reference` where
    the ensemble has a baseline. The file may be larger than memory: it is read, scored and written
    in chunks. FILE.partial is renamed FILE when every row is written.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(f"samples as {JSON_ROWS}", metavar="FILE")
    out: Path | None = option(
        "file of the scores", default=None, metavar="FILE", shown="standard output"
    )
    chunk: int = option(
        "number of samples in memory at once",
        default=default_of("ensemble_rm.ensemble.streaming", "stream_scores", "chunk"),
        metavar="N",
    )
    score_cache: Path | None = option("folder of cached raw scores", default=None, metavar="FOLDER")
    loading: Loading = nested(Loading, panel="Loading")
    aggregator: AggregatorOptions = aggregator_options()

    example: ClassVar[str] = (
        "  ensemble-rm score runs/hh --data samples.jsonl --aggregator lcb --kappa 1.0 "
        "--out scores.jsonl"
    )

    def run(self, console: Console) -> None:
        """Score the samples."""
        aggregator = self.aggregator.make()
        check_can_write(self.out)
        from ensemble_rm.data.loading import read_samples

        samples = read_samples(self.data)
        first = list(islice(samples, 1))  # find a bad file before loading models
        ensemble = use_aggregator(self.loading.open(self.ensemble), aggregator)
        if self.score_cache is not None:
            from ensemble_rm.scoring.score_cache import ScoreCache

            ensemble = ensemble.with_score_cache(ScoreCache(self.score_cache))
        count: Counter[str] = Counter()
        with console.progress() as progress:
            rows = score_rows(ensemble, chain(first, samples), self.chunk, progress, count)
            write_jsonl(self.out, rows)
        cut = {name: count[name] for name in ("prompts_cut", "completions_cut")}
        if self.out is not None:
            console.result(
                {"samples": count["rows"], "out": str(self.out), "members": list(ensemble.names)}
                | {"aggregator": str(ensemble.aggregator), **cut},
                f"{count['rows']} samples in {self.out} by {ensemble.aggregator}",
            )
            console.save(self.out)
        console.read(f"{count['rows']} samples from {self.data}")
        console.cut(cut)
        console.next(f"ensemble-rm compare {self.ensemble} --data PAIRS.jsonl")


def score_rows(
    ensemble: RewardEnsemble,
    samples: Iterable[Sample],
    chunk: int,
    progress: Progress,
    count: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yield every sample's row, and count rows and truncated samples on the way."""
    from ensemble_rm.ensemble.streaming import stream_scores

    for scores in stream_scores(ensemble, samples, chunk=chunk, progress=progress):
        count.update(scores.truncation.to_json())
        count["rows"] += len(scores.reward)
        yield from _rows(scores)


def _rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """Yield a row per sample; a member without a score is null, and so is the spread of one."""
    several = len(scores.names) > 1
    std = scores.std if several else ()
    for i, reward in enumerate(scores.reward):
        members = finite_or_none(scores.members[i])
        row: dict[str, Any] = {
            "reward": float(reward),
            "members": dict(zip(scores.names, members, strict=True)),
        }
        if several:
            row["std"] = finite_or_none(std[i])
        yield row
