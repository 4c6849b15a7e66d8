"""``ensemble-rm combine``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import (
    AggregatorOptions,
    Trust,
    aggregator_options,
    read_pairs,
)
from ensemble_rm.cli.options import nested, option
from ensemble_rm.errors import OptionError
from ensemble_rm.members.backbone.options import TrunkOptions

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console


@dataclass(frozen=True, kw_only=True)
class Combine(Command):
    """Combine existing reward models into one ensemble.

    A member is a sequence-classification model with one output (Hub id or folder), or a saved
    ensemble's folder, such as `ensemble-rm remote` makes from a model behind HTTP. The completions
    of the reference pairs set each member's offset and scale.
    """

    member: tuple[str, ...] = option(
        "reward model or saved ensemble, with its name in the new ensemble; repeated",
        metavar="[NAME=]MODEL",
    )
    data: str = option(
        "reference pairs: JSON lines (.gz too) or a Hub data set", metavar="FILE_OR_HUB_ID"
    )
    skip_bad: bool = option("leave bad rows out, and list them", default=False)
    out: Path = option("folder of the new ensemble", metavar="FOLDER")
    baseline: bool = option("subtract the score of each prompt's `reference`", default=False)
    max_loaded_models: int | None = option(
        "maximum number of models in memory at once", default=None, metavar="N", shown="all"
    )
    trust: Trust = nested(Trust, panel="Trust")
    text: TrunkOptions = nested(TrunkOptions, panel="Text")
    aggregator: AggregatorOptions = aggregator_options()

    example: ClassVar[str] = (
        "  ensemble-rm combine --member deberta=OpenAssistant/reward-model-deberta-v3-large-v2 \\\n"
        "      --member mine=runs/hh --data pairs.jsonl --out runs/both"
    )

    def run(self, console: Console) -> None:
        """Combine the members."""
        aggregator = self.aggregator.make()
        members = _members(self.member)
        pairs = read_pairs(console, self.data, skip_bad=self.skip_bad)
        from ensemble_rm.ensemble.combining import combine

        with console.progress() as progress:
            ensemble = combine(
                members,
                pairs,
                aggregator=aggregator,
                options=self.text,
                baseline=self.baseline,
                max_loaded_models=self.max_loaded_models,
                **self.trust.arguments(),
                progress=progress,
            )
        ensemble.save_pretrained(self.out)
        console.result(
            {"out": str(self.out), "members": list(ensemble.names)}
            | {"aggregator": str(ensemble.aggregator), "normaliser": ensemble.normaliser.to_json()},
            f"{len(ensemble.names)} members: {', '.join(ensemble.names)}",
        )
        console.save(self.out)
        console.next(f"ensemble-rm calibrate {self.out} --data JUDGMENTS.jsonl")


def _members(given: Sequence[str]) -> dict[str, str]:
    members: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals:
            name, model = Path(text).name, text
        if name in members:
            raise OptionError(f"two members are called {name!r}; write --member NAME={model}")
        members[name] = model
    return members
