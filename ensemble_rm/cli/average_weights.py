"""``ensemble-rm average-weights``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import ENSEMBLE, Loading, read_pairs
from ensemble_rm.cli.options import argument, nested, option

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


@dataclass(frozen=True, kw_only=True)
class AverageWeights(Command):
    """Average the members' weights into one model, which costs as much as one member.

    The members must be branches or full models of one run. The completions of the reference pairs
    set the new member's offset and scale. The aggregator is the mean, since one member has no
    disagreement.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(
        "reference pairs: JSON lines (.gz too) or a Hub data set", metavar="FILE_OR_HUB_ID"
    )
    skip_bad: bool = option("leave bad rows out, and list them", default=False)
    out: Path = option("folder of the new ensemble", metavar="FOLDER")
    loading: Loading = nested(Loading, panel="Loading", max_loaded_models=None)

    example: ClassVar[str] = (
        "  ensemble-rm average-weights runs/hh --data runs/hh.parts/validation.jsonl \\\n"
        "      --out runs/hh-averaged"
    )

    def run(self, console: Console) -> None:
        """Average the members."""
        pairs = read_pairs(console, self.data, skip_bad=self.skip_bad)
        ensemble = self.loading.open(self.ensemble)
        from ensemble_rm.ensemble.weight_averaging import average_weights

        with console.progress() as progress:
            averaged = average_weights(ensemble, pairs, out=self.out, progress=progress)
        console.result(
            {"out": str(self.out), "members": list(ensemble.names)}
            | {"normaliser": averaged.normaliser.to_json()},
            f"the mean of {len(ensemble.names)} members: {', '.join(ensemble.names)}",
        )
        console.save(self.out)
        console.next(f"ensemble-rm calibrate {self.out} --data JUDGMENTS.jsonl")
