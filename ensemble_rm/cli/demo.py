"""``ensemble-rm demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import read_pairs
from ensemble_rm.cli.options import option
from ensemble_rm.cli.signatures import default_of

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console

_RUN = ("ensemble_rm.demo.run", "run_demo")


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Train, calibrate and evaluate in one command; plant reward hacks; write a page with pictures.

    The data ship with the project: completions of a real small model, judged by a simulated
    annotator whose true preference probabilities are known. No person judged them. With --data, the
    demo runs on your own pairs, without hacks.
    """

    data: str | None = option(
        "preference pairs: JSON lines or a Hub data set",
        default=None,
        metavar="FILE_OR_HUB_ID",
        shown="those that ship with the project",
    )
    skip_bad: bool = option("leave bad rows out, and list them", default=False)
    backbone: str = option(
        "backbone: minilm, smollm2, a Hub id or a local folder",
        default=default_of(*_RUN, "backbone"),
        metavar="NAME",
    )
    members: int = option("number of members", default=default_of(*_RUN, "members"), metavar="K")
    seed: int = option("seed of the split and of the members", default=default_of(*_RUN, "seed"))
    out: Path = option("folder of the result", default=Path("ensemble-rm-demo"), metavar="FOLDER")

    example: ClassVar[str] = "  ensemble-rm demo\n  ensemble-rm demo --data pairs.jsonl"

    def run(self, console: Console) -> None:
        """Run the demo."""
        from ensemble_rm.demo.data import FILE
        from ensemble_rm.demo.run import run_demo

        pairs = read_pairs(console, self.data or str(FILE), skip_bad=self.skip_bad)
        with console.progress() as progress:
            result = run_demo(
                pairs,
                out=self.out,
                backbone=self.backbone,
                members=self.members,
                seed=self.seed,
                simulated=self.data is None,
                progress=progress,
            )
        console.result(result.to_json(), result.text())
        console.save(self.out)
        console.next("ensemble-rm train --data PAIRS.jsonl --backbone NAME --out runs/mine")
