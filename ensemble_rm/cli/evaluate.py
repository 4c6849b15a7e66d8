"""``ensemble-rm evaluate``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import ENSEMBLE, Loading, read_pairs
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import default_of

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console

_EVALUATE = ("ensemble_rm.evaluation.evaluation", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Evaluate members, their mean and every aggregator on judged pairs.

    Accuracy, NLL, ECE and its expectation under perfect calibration, Brier, before and after
    calibration, with intervals, over all pairs and by `subset`; the gain from pooling the members;
    a reliability diagram and a risk–coverage curve as PNG. Accuracy, NLL and Brier use the pairs'
    weights.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(
        "judged pairs: JSON lines (.gz too) or a Hub data set", metavar="FILE_OR_HUB_ID"
    )
    skip_bad: bool = option("leave bad rows out, and list them", default=False)
    report: Path | None = option(
        "folder of the plots, the table and its JSON", default=None, metavar="FOLDER"
    )
    draws: int = option(
        "number of bootstrap draws", default=default_of(*_EVALUATE, "draws"), metavar="N"
    )
    seed: int = option("seed of the bootstrap", default=default_of(*_EVALUATE, "seed"))
    loading: Loading = nested(Loading, panel="Loading")

    example: ClassVar[str] = "  ensemble-rm evaluate runs/hh --data test.jsonl --report report/"

    def run(self, console: Console) -> None:
        """Evaluate the ensemble."""
        pairs = read_pairs(console, self.data, skip_bad=self.skip_bad)
        from ensemble_rm.evaluation.evaluation import evaluate
        from ensemble_rm.evaluation.report import evaluation_text

        ensemble = self.loading.open(self.ensemble)
        with console.progress() as progress:
            evaluation = evaluate(
                ensemble, pairs, draws=self.draws, seed=self.seed, progress=progress
            )
        data, text = evaluation.to_json(), evaluation_text(evaluation)
        if self.report is not None:
            from ensemble_rm.evaluation.report import draw_evaluation

            pictures = draw_evaluation(evaluation, self.report)
            (self.report / "evaluation.json").write_text(json.dumps(data, indent=1) + "\n")
            (self.report / "evaluation.txt").write_text(text + "\n", encoding="utf-8")
            data["pictures"] = [str(path) for path in pictures]
            text += "\n" + "\n".join(str(path) for path in pictures)
            console.save(self.report)
        console.result(data, text)
        if ensemble.calibration is None:
            console.next(f"ensemble-rm calibrate {self.ensemble} --data JUDGMENTS.jsonl")
        else:
            console.next(f"ensemble-rm serve {self.ensemble}")
