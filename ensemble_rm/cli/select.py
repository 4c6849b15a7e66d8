"""``ensemble-rm select``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import (
    ENSEMBLE,
    JSON_ROWS,
    Loading,
    check_can_write,
    partial_file,
    write_jsonl,
)
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import default_of

if TYPE_CHECKING:
    from ensemble_rm.active_learning.selection import SelectedPairs
    from ensemble_rm.cli.console import Console

_SELECT = ("ensemble_rm.active_learning.selection", "select_pairs")
TASK_FORMATS = ("label-studio", "argilla", "jsonl")
BATCH = "name of the annotation batch, kept with each task"
POLICY = "name of the policy that wrote the completions, kept with each task"


@dataclass(frozen=True, kw_only=True)
class Select(Command):
    """Pick the unjudged pairs that a human should judge, with inclusion probabilities.

    A pair is a row with `prompt` (text or messages), `first` and `second`, and optionally `id` and
    `subset`. The tasks have the sides in random order, and go to Label Studio, to Argilla, or as
    JSON lines to a tool of your own; `ensemble-rm judgments import` reads the answers.
    """

    ensemble: Path = argument(ENSEMBLE)
    pool: str = option(f"unjudged pairs as {JSON_ROWS}", metavar="FILE")
    budget: int = option("number of pairs to pick", metavar="N")
    strategy: Literal["bald", "margin", "disagreement", "random"] = option(
        "utility of a pair: mutual information, small margin, std of the members' margins, or none",
        default=default_of(*_SELECT, "strategy"),
    )
    random_share: float = option(
        "expected share of random picks",
        default=default_of(*_SELECT, "random_share"),
        metavar="SHARE",
    )
    max_per_prompt: int = option(
        "maximum number of pairs per prompt",
        default=default_of(*_SELECT, "max_per_prompt"),
        metavar="N",
    )
    sharpness: float = option(
        "steepness of the inclusion probability in the utility's rank; 0 is random",
        default=default_of(*_SELECT, "sharpness"),
    )
    seed: int = option(
        "seed of the picks and of the order of sides", default=default_of(*_SELECT, "seed")
    )
    format: str = option("format of the tasks", default="jsonl", choices=TASK_FORMATS)
    batch: str | None = option(BATCH, default=None, metavar="NAME")
    policy: str | None = option(POLICY, default=None, metavar="NAME")
    out: Path | None = option(
        "file of the tasks", default=None, metavar="FILE", shown="standard output"
    )
    chunk: int = option(
        "number of samples in memory at once", default=default_of(*_SELECT, "chunk"), metavar="N"
    )
    dry_run: bool = option("pick and report, write nothing", default=False)
    loading: Loading = nested(Loading, panel="Loading")

    example: ClassVar[str] = (
        "  ensemble-rm select runs/hh --pool pairs.jsonl --budget 200 --strategy bald \\\n"
        "      --format label-studio --out tasks.json"
    )

    def run(self, console: Console) -> None:
        """Pick the pairs, and write the tasks."""
        if not self.dry_run:
            check_can_write(self.out)
        from ensemble_rm.active_learning.selection import select_pairs
        from ensemble_rm.active_learning.tasks import to_tasks
        from ensemble_rm.data.loading import read_comparisons

        pool = read_comparisons(self.pool)
        with console.progress() as progress:
            selected = select_pairs(
                # Random picks need no scores, so no model is loaded.
                None if self.strategy == "random" else self.loading.open(self.ensemble),
                pool,
                budget=self.budget,
                strategy=self.strategy,
                random_share=self.random_share,
                max_per_prompt=self.max_per_prompt,
                sharpness=self.sharpness,
                seed=self.seed,
                chunk=self.chunk,
                progress=progress,
            )
        tasks = to_tasks(selected, self.format, batch=self.batch, policy=self.policy)
        if not self.dry_run:
            write_tasks(self.out, self.format, tasks)
        if self.out is not None or self.dry_run:
            console.result(self._data(selected), self._text(selected))
        if self.out is not None and not self.dry_run:
            console.save(self.out)
            answers = "ANSWERS.jsonl" if self.format == "jsonl" else "EXPORT.json --format ..."
            console.next(f"ensemble-rm judgments import judgments.db {answers}")
        console.read(f"{selected.pool} pairs of {selected.prompts} prompts from {self.pool}")
        console.left_out(
            f"{selected.repeated} repeated pairs, {selected.equal_sides} with equal sides"
        )

    def _data(self, selected: SelectedPairs) -> dict[str, Any]:
        return {
            "selected": len(selected),
            "strategy": self.strategy,
            "random_share": self.random_share,
            "pool": selected.pool,
            "prompts": selected.prompts,
            "repeated": selected.repeated,
            "equal_sides": selected.equal_sides,
            "inclusion_floor": selected.floor,
            "effective": selected.weights.effective,
            "seed": selected.seed,
            "format": self.format,
            "out": None if self.out is None else str(self.out),
            "dry_run": self.dry_run,
        }

    def _text(self, selected: SelectedPairs) -> str:
        written = "; nothing written (--dry-run)" if self.dry_run else ""
        return (
            f"{len(selected)} of {selected.pool} pairs of {selected.prompts} prompts by "
            f"{self.strategy}{written}\n"
            f"  smallest inclusion probability of the pool {selected.floor:.3g}; "
            f"{selected.weights.remark}"
        )


def write_tasks(path: Path | None, form: str, tasks: list[dict[str, Any]]) -> None:
    """Write JSON lines, or one array as the tools' own import reads it."""
    if form == "jsonl":
        write_jsonl(path, tasks)
    elif path is None:
        print(json.dumps(tasks, ensure_ascii=False, indent=1))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_file(path)
        text = json.dumps(tasks, ensure_ascii=False, indent=1) + "\n"
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
