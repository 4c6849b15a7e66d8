"""``ensemble-rm make-pairs``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import ENSEMBLE, JSON_ROWS, Loading, check_can_write, write_jsonl
from ensemble_rm.cli.options import argument, nested, option
from ensemble_rm.cli.signatures import default_of

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console

_MAKE_PAIRS = ("ensemble_rm.best_of_n.sampling", "make_pairs")


@dataclass(frozen=True, kw_only=True)
class MakePairs(Command):
    """Make DPO pairs from several samples per prompt: one JSON line per pair.

    A sample is a row with `prompt` (text or messages) and `completion`; a prompt's rows need not be
    adjacent. The output rows are TRL's: prompt, chosen, rejected, with the calibrated probability
    and both rewards. TRL has no soft labels per row: pass the report's `label_smoothing`, the
    expected share of wrong pairs, as its option of that name.
    """

    ensemble: Path = argument(ENSEMBLE)
    data: str = option(f"samples as {JSON_ROWS}", metavar="FILE")
    out: Path | None = option(
        "file of the pairs", default=None, metavar="FILE", shown="standard output"
    )
    threshold: float = option(
        "minimum probability of a pair", default=default_of(*_MAKE_PAIRS, "threshold"), metavar="P"
    )
    per_prompt: int = option(
        "maximum number of pairs per prompt",
        default=default_of(*_MAKE_PAIRS, "per_prompt"),
        metavar="N",
    )
    soft: bool = option("write votes, the soft labels of ensemble-rm train", default=False)
    dry_run: bool = option("report the pairs, and write nothing", default=False)
    loading: Loading = nested(Loading, panel="Loading")

    example: ClassVar[str] = (
        "  ensemble-rm make-pairs runs/hh --data samples.jsonl --threshold 0.8 \\\n"
        "      --out dpo_pairs.jsonl"
    )

    def run(self, console: Console) -> None:
        """Make the pairs."""
        if not self.dry_run:
            check_can_write(self.out)
        import numpy as np

        from ensemble_rm.best_of_n.sampling import make_pairs
        from ensemble_rm.data.loading import read_samples
        from ensemble_rm.data.samples import prompt_key

        samples = list(read_samples(self.data))
        ensemble = self.loading.open(self.ensemble)
        with console.progress() as progress:
            pairs = make_pairs(
                ensemble,
                samples,
                threshold=self.threshold,
                per_prompt=self.per_prompt,
                progress=progress,
            )
        if not self.dry_run:
            write_jsonl(self.out, (pair.to_json(soft=self.soft) for pair in pairs))
        # One minus the mean P(chosen is preferred) is the expected share of wrong pairs.
        wrong = 1 - float(np.mean([pair.probability for pair in pairs])) if pairs else None
        prompts = len({prompt_key(sample.prompt) for sample in samples})
        data = {
            "samples": len(samples),
            "prompts": prompts,
            "pairs": len(pairs),
            "threshold": self.threshold,
            "label_smoothing": wrong,
            "out": None if self.dry_run else str(self.out),
        }
        expected = "" if wrong is None else f"; label_smoothing={wrong:.3f} expects that many wrong"
        place = "would be made" if self.dry_run else f"in {self.out}"
        if self.out is not None or self.dry_run:
            console.result(
                data,
                f"{len(pairs)} pairs {place}, of {len(samples)} samples of {prompts} prompts, each "
                f"preferred with probability ≥ {self.threshold}{expected}",
            )
        if self.out is not None and not self.dry_run:
            console.save(self.out)
        console.read(f"{len(samples)} samples of {prompts} prompts from {self.data}")
