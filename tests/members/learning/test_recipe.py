"""Recipes: what they refuse, what is saved of them, and those that older versions saved."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from ensemble_rm.errors import OptionError
from ensemble_rm.members import (
    BranchRecipe,
    FullRecipe,
    HeadRecipe,
    LoraRecipe,
    Recipe,
    make_recipe,
    member_kind,
    trained_kinds,
)

# What `train` recorded when one flat recipe served all kinds.
FLAT: dict[str, Any] = {
    "solver": "convex",
    "prior": [0.45, 0.65],
    "epochs": 7,
    "patience": 2,
    "learning_rate": 0.002,
    "weight_decay": [0.03],
    "batch_size": 8,
    "clip": 0.5,
    "smoothing": 0.1,
    "centring": 0.01,
    "bootstrap": True,
    "subspace": 0.5,
    "hidden": 0,
    "warmup": 0.2,
    "first_head": "fitted",
    "head_rate": 5.0,
    "dropout": None,
    "reinitialise": 0,
    "diversity": 0.0,
}
COMMON: dict[str, Any] = {
    name: FLAT[name]
    for name in (
        *("epochs", "patience", "learning_rate", "batch_size", "clip", "smoothing", "centring"),
        "bootstrap",
    )
}
TUNED = COMMON | {"weight_decay": 0.03, "warmup": 0.2, "dropout": None}
BRANCHED = TUNED | {
    "views": ("4:both", "4:both"),
    "blocks": 2,
    "subspace": 0.5,
    "first_head": "fitted",
    "head_rate": 5.0,
}
LORA = {"rank": 2, "alpha": 4.0, "targets": ["q_proj"], "dropout": 0.1}
OLD: dict[str, tuple[dict[str, Any], Recipe]] = {
    "head": (
        {"views": ["3:mean", "4:both"], "recipe": FLAT | {"solver": "adam"}},
        HeadRecipe(
            **COMMON,
            views=("3:mean", "4:both"),
            solver="adam",
            prior=(0.45, 0.65),
            weight_decay=(0.03,),
            subspace=0.5,
        ),
    ),
    "branch": (
        {"views": ["4:both", "4:both"], "blocks": 2, "recipe": FLAT | {"reinitialise": 1}},
        BranchRecipe(**BRANCHED, reinitialise=1),
    ),
    "lora": (
        {
            "views": ["4:both", "4:both"],
            "blocks": 2,
            "lora": LORA,
            "warm_start": True,
            "recipe": FLAT | {"diversity": 0.1},
        },
        LoraRecipe(
            **BRANCHED,
            rank=2,
            alpha=4.0,
            targets=("q_proj",),
            adapter_dropout=0.1,
            warm_start=True,
            diversity=0.1,
        ),
    ),
    "full": ({"views": [], "recipe": FLAT}, FullRecipe(**TUNED)),
}


@pytest.mark.parametrize("kind", trained_kinds())
def test_flat_recipes_of_older_versions_are_read(kind: str) -> None:
    provenance, recipe = OLD[kind]
    assert member_kind(kind).recipe_class().from_provenance(provenance) == recipe


@pytest.mark.parametrize("kind", trained_kinds())
def test_a_saved_recipe_is_read_back(kind: str) -> None:
    recipe = OLD[kind][1]
    saved = json.loads(json.dumps({"recipe": recipe.to_json()}))
    assert type(recipe).from_provenance(saved) == recipe


def test_what_does_not_decide_the_result_is_not_saved() -> None:
    recipe = FullRecipe(callbacks=[object()], trainer_args={"report_to": "wandb"})
    assert recipe.to_json() == FullRecipe().to_json()
    assert BranchRecipe(states_limit=1).to_json() == BranchRecipe().to_json()
    assert "epochs" in recipe.to_json()


@pytest.mark.parametrize("kind", trained_kinds())
def test_every_field_has_a_help_text_and_a_default(kind: str) -> None:
    recipe = make_recipe(kind)
    assert recipe.kind == kind
    for own in fields(recipe):
        assert own.metadata["help"]
        getattr(recipe, own.name)


@pytest.mark.parametrize("recipe", [HeadRecipe, BranchRecipe, LoraRecipe, FullRecipe])
@pytest.mark.parametrize(
    "bad", [{"epochs": 0}, {"smoothing": 1.0}, {"learning_rate": float("nan")}, {"centring": -1.0}]
)
def test_values_out_of_range_are_refused(recipe: type[Recipe], bad: dict[str, Any]) -> None:
    if recipe is HeadRecipe:
        bad = bad | {"solver": "adam"}
    with pytest.raises(OptionError, match=f"{next(iter(bad))} must be"):
        recipe(**bad)


@pytest.mark.parametrize("views", ["4:last", ["4:last"], ("4:last",)])
def test_one_view_may_be_given_alone(views: Any) -> None:
    assert HeadRecipe(views=views).views == ("4:last",)
