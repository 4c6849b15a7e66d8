"""Put reward models that exist already behind one aggregator.

A member is a sequence-classification model of one output (Hub id or folder), or a saved ensemble's
folder, such as `ensemble-rm remote` makes of a model behind HTTP. The completions of the reference
pairs set each member's offset and scale.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_rm.cli.common import (
    Bars,
    add_aggregator,
    add_json,
    add_max_loaded,
    add_out_folder,
    add_pairs,
    add_text,
    read_aggregator,
    read_pairs,
    read_text_options,
    say,
)
from ensemble_rm.errors import OptionError

if TYPE_CHECKING:
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble

HELP = "put existing reward models behind one aggregator"
EXAMPLE = (
    "  ensemble-rm combine --member deberta=OpenAssistant/reward-model-deberta-v3-large-v2 \\\n"
    "      --member mine=runs/hh --data pairs.jsonl --out runs/both"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--member",
        action="append",
        required=True,
        metavar="[NAME=]MODEL",
        help="a reward model or a saved ensemble, and the name that it shall bear; repeated",
    )
    add_pairs(parser, "reference")
    add_out_folder(parser)
    parser.add_argument(
        "--baseline", action="store_true", help="subtract the score of each prompt's `reference`"
    )
    add_max_loaded(parser)
    add_text(parser)
    add_aggregator(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    aggregator = read_aggregator(args)
    members = _members(args.member)
    pairs = read_pairs(args.data, skip_bad=args.skip_bad)
    from ensemble_rm.ensemble.combining import combine

    with Bars(quiet=args.json) as bars:
        ensemble = combine(
            {name: _opened(member, args.device) for name, member in members.items()},
            pairs,
            aggregator=aggregator,
            options=read_text_options(args),
            baseline=args.baseline,
            max_loaded_models=args.max_loaded_models,
            progress=bars,
        )
    ensemble.save_pretrained(args.out)
    say(
        args,
        {"out": str(args.out), "members": list(ensemble.names)}
        | {"aggregator": str(ensemble.aggregator), "normaliser": ensemble.normaliser.to_json()},
        f"{len(ensemble.names)} members in {args.out}: {', '.join(ensemble.names)}",
    )


def _opened(member: str, device: str | None) -> RewardEnsemble | str:
    """Return a saved ensemble with its members' tokens; a model's name as it is."""
    from ensemble_rm.cli.tokens import with_tokens
    from ensemble_rm.ensemble.reward_ensemble import RewardEnsemble
    from ensemble_rm.ensemble.storage import FILE

    if not (Path(member).expanduser() / FILE).exists():
        return member
    return with_tokens(RewardEnsemble.from_pretrained(member, device=device))


def _members(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, model = text.partition("=")
        if not equals:
            name, model = Path(text).name, text
        if name in found:
            raise OptionError(f"two members are called {name!r}; write --member NAME={model}")
        found[name] = model
    return found
