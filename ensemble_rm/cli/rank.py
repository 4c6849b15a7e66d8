"""``ensemble-rm rank``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.data.samples import Sample
    from ensemble_rm.ensemble.results import Ranking


@dataclass(frozen=True, kw_only=True)
class Rank(Command):
    """Rank the completions of each prompt by reward: one JSON line per prompt, best first.

    A sample is a row with `prompt` (text or messages) and `completion`, and with `reference` where
    the ensemble has a baseline; a prompt's rows need not be adjacent. A line has the prompt, its
    completions with their rewards, and `positions`: the index of each among the prompt's rows.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(f"samples, several per prompt, as {JSON_ROWS}", metavar="FILE")
    out: Path | None = option(
        "file of the rankings", default=None, metavar="FILE", shown="standard output"
    )
    top: int | None = option(
        "number of completions to keep per prompt", default=None, metavar="N", shown="all"
    )
    loading: Loading = nested(Loading, panel="Loading")
    aggregator: AggregatorOptions = aggregator_options()

    example: ClassVar[str] = (
        "  ensemble-rm rank runs/hh --data samples.jsonl --top 1 --out best.jsonl"
    )

    def run(self, console: Console) -> None:
        """Rank the completions."""
        if self.top is not None and self.top < 1:
            raise OptionError(f"--top must be at least 1, not {self.top}")
        aggregator = self.aggregator.make()
        check_can_write(self.out)
        from ensemble_rm.data.loading import read_samples
        from ensemble_rm.data.samples import prompt_key

        groups: dict[Any, list[Sample]] = {}
        for sample in read_samples(self.data):
            # The baseline is the reference's score, so rewards compare only within one reference.
            groups.setdefault((prompt_key(sample.prompt), sample.reference), []).append(sample)
        ensemble = use_aggregator(self.loading.open(self.ensemble), aggregator)
        with console.progress() as progress:
            rankings = ensemble.rank(
                [group[0].prompt for group in groups.values()],
                [[sample.completion for sample in group] for group in groups.values()],
                references=[group[0].reference for group in groups.values()],
                progress=progress,
            )
        rows = zip(groups.values(), rankings, strict=True)
        write_jsonl(self.out, (self._row(group, ranking) for group, ranking in rows))
        count = sum(map(len, groups.values()))
        counts = [ranking.truncation.to_json() for ranking in rankings]
        cut = {
            name: sum(each[name] for each in counts) for name in ("prompts_cut", "completions_cut")
        }
        if self.out is not None:
            data: dict[str, Any] = {"prompts": len(groups), "samples": count, "out": str(self.out)}
            data |= {"aggregator": str(ensemble.aggregator), **cut}
            text = f"{count} completions of {len(groups)} prompts in {self.out}"
            console.result(data, f"{text} by {ensemble.aggregator}")
            console.save(self.out)
        console.read(f"{count} samples of {len(groups)} prompts from {self.data}")
        console.cut(cut)
        console.next(f"ensemble-rm make-pairs {self.ensemble} --data {self.data}")

    def _row(self, group: list[Sample], ranking: Ranking) -> dict[str, Any]:
        from ensemble_rm.data.samples import prompt_json

        order = ranking.order.tolist()[: self.top]
        return {
            "prompt": prompt_json(group[0].prompt),
            "completions": [group[i].completion for i in order],
            "rewards": [float(ranking.reward[i]) for i in order],
            "positions": order,
        }
