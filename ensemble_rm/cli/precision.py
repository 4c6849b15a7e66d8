"""``ensemble-rm precision``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import ENSEMBLE, JSON_ROWS, Loading
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import default_of

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


@dataclass(frozen=True, kw_only=True)
class Precision(Command):
    """Score samples in float32 and in another dtype, and report the differences.

    Differences of every member and of the reward, rank agreement, and pairs within a prompt whose
    order changes or that become equal.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(f"samples, several per prompt, as {JSON_ROWS}", metavar="FILE")
    dtype: str = option(
        "dtype to compare with float32",
        default=default_of("ensemble_rm.evaluation.precision", "precision_report", "dtype"),
        choices=("bfloat16", "float16", "float32"),
    )
    loading: Loading = nested(Loading, panel="Loading")

    example: ClassVar[str] = "  ensemble-rm precision runs/hh --data samples.jsonl --dtype bfloat16"

    def run(self, console: Console) -> None:
        """Compare the dtypes."""
        from ensemble_rm.data.loading import read_samples

        samples = list(read_samples(self.data))
        from ensemble_rm.evaluation.precision import precision_report, precision_text

        ensemble = self.loading.open(self.ensemble)
        with console.progress() as progress:
            report = precision_report(ensemble, samples, dtype=self.dtype, progress=progress)
        console.result(report.to_json(), precision_text(report))
        console.read(f"{len(samples)} samples from {self.data}")
