"""``ensemble-rm train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ensemble_rm.cli.command import Command
from ensemble_rm.cli.common import read_pairs, write_jsonl
from ensemble_rm.cli.console import counted
from ensemble_rm.cli.options import field_type, nested, option, shown, without_none
from ensemble_rm.members.backbone.options import TrunkOptions
from ensemble_rm.members.branches.recipe import BranchRecipe
from ensemble_rm.members.registry import make_recipe, member_kind, trained_kinds
from ensemble_rm.training.request import TrainingRequest

if TYPE_CHECKING:
    from ensemble_rm.cli.console import Console
    from ensemble_rm.data.samples import Preferences

PARTS = ("train", "validation", "calibration", "test")


def _recipe_options() -> type:
    """Return a dataclass with the fields of every kind's recipe, each None unless it is given.

    Kinds share fields, perhaps with other defaults; the help shows the default of each kind.
    """
    options: dict[str, tuple[str, Any, dict[str, Any]]] = {}
    defaults: dict[str, dict[str, list[str]]] = {}
    for kind in trained_kinds():
        recipe = member_kind(kind).recipe_class()
        for each in fields(recipe):
            if each.name == "callbacks":  # objects, which cannot be given as text
                continue
            text, _, stated = each.metadata["help"].partition(" (default: ")
            inner = without_none(field_type(recipe, each.name))[0]
            # The first kind is `head`, which accepts several values where other kinds take one.
            metadata = dict(each.metadata) | {"help": text}
            options.setdefault(each.name, (each.name, inner | None, metadata))
            default = stated.removesuffix(")") or shown(
                each.default if each.default_factory is MISSING else each.default_factory()
            )
            defaults.setdefault(each.name, {}).setdefault(default, []).append(kind)
    described = [
        (name, kind, field(default=None, metadata=metadata | {"shown": _join(defaults[name])}))
        for name, kind, metadata in options.values()
    ]
    return make_dataclass("RecipeOptions", described, frozen=True, kw_only=True)


def _join(defaults: dict[str, list[str]]) -> str:
    """Return the kinds' defaults in words, or the common default once."""
    if len(defaults) == 1:
        return next(iter(defaults))
    return "; ".join(f"{', '.join(kinds)}: {text}" for text, kinds in defaults.items())


def read_size(text: str) -> int:
    """Read a number of bytes, such as ``16GiB`` or ``17179869184``."""
    number = text.strip().removesuffix("GiB")
    try:
        return int(float(number) * 2**30) if number != text.strip() else int(number)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size, such as 16GiB") from None


RecipeOptions = _recipe_options()


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train several independently seeded reward models on preference pairs.

    The pairs are split by prompt into four parts. The first two train the members; the other two
    are written next to the ensemble, for `calibrate` and `evaluate`. A killed run with the same
    options resumes.
    """

    data: str = option(
        "preference pairs: JSON lines (.gz too) or a Hub data set", metavar="FILE_OR_HUB_ID"
    )
    skip_bad: bool = option("leave bad rows out, and list them", default=False)
    out: Path = option("folder of the ensemble", metavar="FOLDER")
    kind: str = option(
        "kind of member: heads on one frozen trunk, copies of its top blocks, LoRA adapters on "
        "its blocks, or copies of the whole model",
        default=trained_kinds()[0],
        choices=trained_kinds(),
    )
    split: tuple[float, float, float, float] = option(
        "shares of train, validation, calibration and test",
        default=(0.7, 0.1, 0.1, 0.1),
        metavar="SHARES",
    )
    dry_run: bool = option("report the plan, train nothing", default=False)
    request: TrainingRequest = nested(
        TrainingRequest,
        recipe=None,
        options=None,
        start=None,
        out=None,
        backbone={"metavar": "NAME"},
        members={"metavar": "K"},
        cache_dir={"metavar": "FOLDER"},
    )
    text: TrunkOptions = nested(TrunkOptions, panel="Text")
    recipe: Any = nested(
        RecipeOptions,
        panel="Recipe",
        views={"flag": "view", "metavar": "LAYER:POOLING"},
        targets={"flag": "target", "metavar": "NAME"},
        trainer_args={"flag": "trainer-arg", "metavar": "NAME=JSON"},
        states_limit={
            "help": "maximum size of the token states on disk, in bytes or as in 20GiB",
            "parse": read_size,
            "metavar": "SIZE",
            "shown": f"{BranchRecipe.states_limit / 2**30:g}GiB",
        },
    )

    example: ClassVar[str] = (
        "  ensemble-rm train --data pairs.jsonl \\\n"
        "      --backbone HuggingFaceTB/SmolLM2-135M-Instruct --members 5 --out runs/hh"
    )

    def run(self, console: Console) -> None:
        """Train the members."""
        request = self.full_request()
        pairs = read_pairs(console, self.data, skip_bad=self.skip_bad)
        parts = dict(zip(PARTS, pairs.split(*self.split, seed=request.seed), strict=True))
        counts = {name: len(part) for name, part in parts.items()}
        from ensemble_rm.scoring.baselines import reference_samples
        from ensemble_rm.training.run import plan, train_request

        if request.baseline:
            reference_samples(parts["validation"].samples())  # fail before the data are read
        if self.dry_run:
            planned = plan(parts["train"], parts["validation"], request)
            console.result({"dry_run": True, "parts": counts} | planned, plan_text(planned, counts))
            return
        with console.progress() as progress:
            ensemble = train_request(
                parts["train"], parts["validation"], request, progress=progress
            )
        folder = _write_parts(self.out, parts)
        nll: list[float] = ensemble.provenance["validation_nll"]
        cut = ensemble.provenance["truncation"]
        console.result(
            {"out": str(self.out), "parts": counts, "parts_folder": str(folder), "truncation": cut}
            | {"members": list(ensemble.names), "validation_nll": nll},
            "\n".join(
                f"  {name}: validation NLL {x:.4f}"
                for name, x in zip(ensemble.names, nll, strict=True)
            ),
        )
        console.cut(cut)
        console.save(self.out)
        console.next(
            f"ensemble-rm calibrate {self.out} --data {folder / 'calibration.jsonl'} && "
            f"ensemble-rm evaluate {self.out} --data {folder / 'test.jsonl'}"
        )

    def full_request(self) -> TrainingRequest:
        """Return the training request, with the recipe of the chosen kind."""
        given = {
            each.name: value
            for each in fields(self.recipe)
            if (value := getattr(self.recipe, each.name)) is not None
        }
        recipe = member_kind(self.kind).recipe_class()
        for name, value in given.items():
            several = isinstance(value, tuple) and len(value) == 1
            if several and hasattr(recipe, name) and isinstance(getattr(recipe, name), float):
                (given[name],) = value
        return replace(
            self.request,
            recipe=make_recipe(self.kind, **given),
            options=self.text,
            out=self.out,
        )


def plan_text(planned: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Return the plan of a training run for a terminal, one setting per line."""
    cut = planned["truncation"]
    rows = {
        "backbone": planned["backbone"],
        "members": f"{planned['members']} of kind {planned['kind']}",
        "template": planned["template"],
        "pairs": ", ".join(f"{counts[name]} {name}" for name in PARTS),
        "tokens": f"{planned['tokens']:,}",
        "cut": f"{counted(cut['prompts_cut'], 'prompt')}, "
        f"{counted(cut['completions_cut'], 'completion')}",
        "token states": f"{planned['token_states_bytes'] / 2**30:.2f} GiB on disk",
    }
    lines = [f"{name + ':':20s} {value}" for name, value in rows.items()]
    lines.append("recipe:")
    for name, value in planned["recipe"].items():
        lines.append(f"  {name.replace('_', ' ') + ':':18s} {_setting(value)}")
    return "\n".join([*lines, "nothing trained (--dry-run)"])


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_setting(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(map(_setting, value)) or "none"
    return shown(value)


def _write_parts(out: Path, parts: dict[str, Preferences]) -> Path:
    # Next to the ensemble, not in it: a save replaces the ensemble's folder.
    folder = out.parent / f"{out.name}.parts"
    for name, part in parts.items():
        write_jsonl(folder / f"{name}.jsonl", (pair.to_json() for pair in part))
    return folder
