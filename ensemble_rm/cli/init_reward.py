"""``ensemble-rm init-reward``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import ENSEMBLE, AggregatorOptions, aggregator_options
from ensemble_rm.cli.options import argument, option
from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


@dataclass(frozen=True, kw_only=True)
class InitReward(Command):
    """Write a Python file with the reward function for TRL, OpenRLHF or veRL.

    The file names the ensemble, its version, its device and its aggregator, and is meant to be read
    and edited. It pins the version: if the ensemble in that folder changes, scoring raises an
    error.
    """

    loop: Literal["trl", "openrlhf", "verl"] = argument("library of the RL loop")
    ensemble: Path = argument(ENSEMBLE)
    device: str = option("device of the members: cpu, cuda (each rank's own) or cuda:1")
    out: Path = option("new Python file", metavar="FILE")
    aggregator: AggregatorOptions = aggregator_options()
    dry_run: bool = option("print the file, and write nothing", default=False)

    example: ClassVar[str] = (
        "  ensemble-rm init-reward trl runs/hh --device cuda --aggregator lcb --kappa 1.0 \\\n"
        "      --out hh_reward.py"
    )

    def run(self, console: Console) -> None:
        """Write the file."""
        aggregator = self.aggregator.make()
        out = self.out
        if out.suffix != ".py" or not out.stem.isidentifier():
            raise OptionError(f"--out must be a Python module's file, such as reward.py, not {out}")
        if out.exists() and not self.dry_run:
            raise OptionError(f"{out} exists; name another file, or remove it")
        from ensemble_rm.rl.pinned import folder_digest
        from ensemble_rm.rl.templates import render

        folder = self.ensemble.expanduser().absolute()
        digest = folder_digest(folder)
        text = render(
            self.loop,
            folder=str(folder),
            digest=digest,
            device=self.device,
            aggregator=aggregator,
            file_name=out.name,
        )
        data: dict[str, Any] = {"loop": self.loop, "out": str(out), "digest": digest}
        data["written"] = not self.dry_run
        if self.dry_run:
            console.result(data | {"text": text}, text)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        text = (
            f"{out}: the reward of version {digest[:12]} for {self.loop}; "
            "its first lines show how to pass it to the trainer"
        )
        console.result(data, text)
        console.save(out, config=False)
