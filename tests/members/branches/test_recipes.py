"""What a recipe changes of branches: passes within the budget, dropout, fresh blocks, subspaces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_rm import Preferences, TrunkOptions, load_preferences, train
from ensemble_rm.demo.data import FILE
from ensemble_rm.errors import OptionError
from ensemble_rm.members import BranchRecipe, BranchScorer, make_recipe
from ensemble_rm.members.backbone.checkpoint import load_trunk, locate
from ensemble_rm.members.backbone.token_states import token_states
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.branches.training import initialise
from ensemble_rm.members.learning.dropout import set_dropout

OPTIONS = TrunkOptions(max_length=32, device="cpu", token_budget=512)
QUICK = BranchRecipe(blocks=2, epochs=1, batch_size=16, learning_rate=1e-3)


@pytest.fixture(scope="module")
def parts() -> tuple[Preferences, ...]:
    return load_preferences(FILE)[:100].split(0.5, 0.25, seed=0)


def branches(
    parts: tuple[Preferences, ...], folder: Path, recipe: BranchRecipe, **options: Any
) -> BranchScorer:
    ensemble = train(
        *parts,
        backbone=folder,
        members=2,
        recipe=recipe,
        options=replace(OPTIONS, **options),
        cache_dir=None,
    )
    (scorer,) = ensemble.scorers
    assert isinstance(scorer, BranchScorer)
    return scorer


def test_a_step_in_many_passes_is_the_step_in_one(
    parts: tuple[Preferences, ...], small_folder: Path
) -> None:
    one, many = (branches(parts, small_folder, QUICK, token_budget=budget) for budget in (4096, 96))
    found = [scorer.score(parts[1].samples()) for scorer in (one, many)]
    # Up to a constant: a pair's loss does not see it, and rounding moves it.
    np.testing.assert_allclose(*(x - x.mean(axis=0) for x in found), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 0.25, None])
def test_dropout_is_what_the_recipe_says(small_folder: Path, rate: float | None) -> None:
    model = load_trunk(locate(small_folder).folder, dtype="float32")
    own = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    set_dropout(model, rate)
    found = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert found == (own if rate is None else [rate] * len(own))
    attention = [m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")]
    assert own or attention  # an encoder has the ones, a decoder the others
    assert rate is None or set(attention) <= {rate}


def test_without_dropout_the_dropout_seed_decides_nothing(
    parts: tuple[Preferences, ...], small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ensemble_rm.training import run as module

    def scores(shift: int, dropout: float) -> np.ndarray:
        def seeds(seed: int, members: int) -> list[dict[str, int]]:
            return [s | {"dropout": s["dropout"] + shift} for s in own(seed, members)]

        own = module.member_seeds
        with monkeypatch.context() as patch:
            patch.setattr(module, "member_seeds", seeds)
            recipe = replace(QUICK, dropout=dropout)
            return branches(parts, small_folder, recipe).score(parts[1].samples())

    np.testing.assert_array_equal(scores(0, 0.0), scores(1, 0.0))
    assert (scores(0, 0.2) != scores(1, 0.2)).any()


def test_fresh_blocks_are_each_members_own(
    parts: tuple[Preferences, ...], small_folder: Path
) -> None:
    still = replace(QUICK, reinitialise=1, learning_rate=1e-12)
    scorer = branches(parts, small_folder, still)
    trunk = Trunk(locate(small_folder), OPTIONS, top=2)
    lower, upper = (
        next(n for n, p in block.named_parameters() if p.dim() == 2) for block in trunk.rest
    )
    kept = dict(trunk.rest[0].named_parameters())[lower]
    a, b = scorer.tensors
    torch.testing.assert_close(a[f"0.{lower}"], kept, atol=1e-6, rtol=0)
    torch.testing.assert_close(b[f"0.{lower}"], kept, atol=1e-6, rtol=0)
    before = dict(trunk.rest[1].named_parameters())[upper]
    assert (a[f"1.{upper}"] != b[f"1.{upper}"]).any()
    assert (a[f"1.{upper}"] - before).abs().max() > 1e-3
    # As the architecture draws them: normal, of the config's spread.
    std = float(a[f"1.{upper}"].std())
    assert std == pytest.approx(trunk.model.config.initializer_range, rel=0.3)


def test_initialising_spares_the_other_blocks(small_folder: Path) -> None:
    model = load_trunk(locate(small_folder).folder, dtype="float32")
    blocks = Trunk(locate(small_folder), OPTIONS).blocks
    before = [{n: p.clone() for n, p in block.named_parameters()} for block in blocks]
    initialise(model, [blocks[1]])
    for i, (block, own) in enumerate(zip(blocks, before, strict=True)):
        same = all(torch.equal(p, own[n]) for n, p in block.named_parameters())
        assert same == (i != 1)


def test_a_branchs_head_sees_its_subspace_alone(
    parts: tuple[Preferences, ...], small_folder: Path
) -> None:
    scorer = branches(parts, small_folder, replace(QUICK, subspace=0.5))
    seen = scorer.heads.gain != 0
    assert seen.sum(axis=1).tolist() == [16, 16]  # of both poolings of a width of 16
    assert (seen[0] != seen[1]).any()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("full", {"subspace": 0.5}, "subspace"),
        ("lora", {"reinitialise": 1}, "reinitialise"),
        ("branch", {"reinitialise": -1}, "reinitialise"),
        ("branch", {"dropout": 1.0}, "dropout"),
    ],
)
def test_a_recipe_refuses(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_recipe(kind, **changes)


def test_states_of_some_samples_are_those_of_all(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    trunk = Trunk(locate(small_folder), OPTIONS, top=2)
    states = token_states(trunk, trunk.encoder.encode(parts[0].samples()), tmp_path)
    rows = np.array([7, 3, 11])
    some = states.take(rows)
    assert len(some) == 3 and some.lengths.tolist() == states.lengths[rows].tolist()
    for place in (0, 1, 2):
        one, whole = some.batch([place])[1], states.batch([int(rows[place])])[1]
        assert one is not None and whole is not None
        assert torch.equal(one, whole)
