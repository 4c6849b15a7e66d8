"""``ensemble-rm compare``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ensemble_rm.arrays import finite_or_none
from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import (
    ENSEMBLE,
    JSON_ROWS,
    Loading,
    check_can_write,
    write_jsonl,
)
from ensemble_rm.cli.options import argument, nested, option

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.ensemble.results import Comparison


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Give the probability that a human prefers each first completion: one JSON line per pair.

    A pair is a row with `prompt` (text or messages), `first` and `second`; `chosen` and `rejected`
    are read as first and second. `subset` selects the slice's temperature if the calibration has
    slices; `reference` is needed if the ensemble has a baseline.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(f"pairs as {JSON_ROWS}", metavar="FILE")
    out: Path | None = option(
        "file of the verdicts", default=None, metavar="FILE", shown="standard output"
    )
    loading: Loading = nested(Loading, panel="Loading")

    example: ClassVar[str] = "  ensemble-rm compare runs/hh --data pairs.jsonl --out verdicts.jsonl"

    def run(self, console: Console) -> None:
        """Compare the pairs."""
        check_can_write(self.out)
        from ensemble_rm.data.loading import read_comparisons

        pairs = read_comparisons(self.data)
        ensemble = self.loading.open(self.ensemble)
        with console.progress() as progress:
            verdict = ensemble.compare(
                [pair.prompt for pair in pairs],
                [pair.chosen for pair in pairs],
                [pair.rejected for pair in pairs],
                subsets=pairs.subsets,
                references=[pair.reference for pair in pairs],
                progress=progress,
            )
        write_jsonl(self.out, _rows(verdict, several=len(ensemble.names) > 1))
        if self.out is not None:
            data: dict[str, Any] = {"pairs": len(pairs), "out": str(self.out)}
            data |= {
                "aggregator": str(ensemble.aggregator),
                "truncation": verdict.truncation.to_json(),
            }
            console.result(data, f"{len(pairs)} pairs in {self.out} by {ensemble.aggregator}")
            console.save(self.out)
        console.read(f"{len(pairs)} pairs from {self.data}")
        console.cut(verdict.truncation.to_json())
        console.next(f"ensemble-rm route {self.ensemble} --data {self.data} --share 0.2")


def _rows(verdict: Comparison, *, several: bool) -> Iterator[dict[str, float | None]]:
    for i in range(len(verdict.probability)):
        row: dict[str, float | None] = {
            "probability": float(verdict.probability[i]),
            "margin": float(verdict.margin[i]),
        }
        if verdict.tie_probability is not None:
            row["tie_probability"] = float(verdict.tie_probability[i])
        # One member has no disagreement to split, and its mixture is the probability itself.
        if several:
            row |= {
                "mixture_probability": finite_or_none(verdict.mixture_probability[i]),
                "total": finite_or_none(verdict.total[i]),
                "aleatoric": finite_or_none(verdict.aleatoric[i]),
                "epistemic": finite_or_none(verdict.epistemic[i]),
            }
        yield row
