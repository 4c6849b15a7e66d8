"""``ensemble-rm retrain``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.common import read_pairs
from ensemble_rm.cli.jobs import TIME, Job
from ensemble_rm.cli.options import nested, option
from ensemble_rm.members.backbone.cache_folder import DEFAULT_CACHE
from ensemble_rm.retraining.options import RetrainingRunOptions

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.members.learning.recipe import Recipe

_AS_TRAINED = {"default": None, "shown": "as the members were trained", "panel": "Training"}


@dataclass(frozen=True, kw_only=True)
class Retrain(Job):
    """Train the published members further on new judgments, and publish them if they are better.

    RUN is a saved ensemble's folder; its first version is the ensemble as it is. Members continue
    from their weights on the old pairs and the new judgments; the newest prompts decide by NLL and
    accuracy. The reward keeps the spread that it had on the reference completions. If the gate
    refuses, the current version stays, and the reason is reported (exit codes 10, 11 and 13).
    `ensemble-rm versions rollback RUN` goes back. Every run is a line in RUN/audit.jsonl.
    """

    data: str = option(
        "old training pairs of the members: JSON lines (.gz too) or a Hub data set",
        metavar="FILE_OR_HUB_ID",
    )
    skip_bad: bool = option("leave bad rows out, and list them", default=False)
    reference: str | None = option(
        "pairs on whose completions the reward keeps its spread",
        default=None,
        metavar="FILE",
        shown="those of --data",
    )
    options: RetrainingRunOptions = nested(
        RetrainingRunOptions, panel="Job", since=TIME, until=TIME
    )
    epochs: int | None = option("maximum number of epochs", **_AS_TRAINED)
    patience: int | None = option(
        "epochs without a better validation NLL after which a member stops", **_AS_TRAINED
    )
    learning_rate: float | None = option("learning rate of AdamW", **_AS_TRAINED)
    cache_dir: Path = option(
        "folder of features and token states",
        default=DEFAULT_CACHE,
        metavar="FOLDER",
        panel="Training",
    )

    example: ClassVar[str] = (
        "  ensemble-rm retrain runs/hh --data runs/hh.parts/train.jsonl \\\n"
        "      --judgments judgments.db --reference runs/hh.parts/validation.jsonl"
    )

    def run(self, console: Console) -> int:
        """Run the job; return the verdict's exit code."""
        from ensemble_rm.retraining.job import retrain_run

        old = read_pairs(console, self.data, skip_bad=self.skip_bad)
        reference = None
        if self.reference is not None:
            reference = read_pairs(console, self.reference, skip_bad=self.skip_bad)
        with self.opened(console) as (store, progress):
            outcome = retrain_run(
                self.run_folder,
                old,
                store,
                reference=reference,
                recipe=self._recipe(),
                options=self.options,
                load=self.load,
                cache_dir=self.cache_dir,
                progress=progress,
            )
        return self.report(console, outcome, dry_run=self.options.dry_run)

    def _recipe(self) -> Recipe | None:
        """Return the ensemble's own recipe with the given options; None if none is given."""
        names = ("epochs", "patience", "learning_rate")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if not given:
            return None
        from ensemble_rm.training.request import TrainingRequest

        return replace(TrainingRequest.of(self.load(self.run_folder)).recipe, **given)

    def next_command(self, verdict: str) -> str:
        """Return the command that follows a verdict."""
        run = self.run_folder
        return {
            "published": f"ensemble-rm recalibrate {run} --judgments {self.judgments}",
            "kept": f"ensemble-rm drift {run} --judgments {self.judgments}",
            "too few": f"ensemble-rm select {run} --pool PAIRS.jsonl --budget 200",
        }[verdict]
