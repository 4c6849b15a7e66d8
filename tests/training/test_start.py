"""Members that are trained again go on from their own weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ensemble_rm import FunctionScorer, Preferences, RewardEnsemble, train
from ensemble_rm.aggregation import mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.errors import OptionError
from ensemble_rm.members import BranchRecipe, FullRecipe, HeadRecipe, LoraRecipe, Recipe
from ensemble_rm.training import TrainingRequest, train_request
from tests.support.small_runs import OPTIONS, few_pairs

KINDS = ("head", "hidden", "branch", "lora", "full")


def recipe_of(kind: str) -> Recipe:
    if kind in ("head", "hidden"):
        return HeadRecipe(
            views=("4:both",),
            solver="adam",
            epochs=3,
            hidden=4 if kind == "hidden" else 0,
            learning_rate=1e-3,
            subspace=0.7,
            patience=3,
        )
    if kind == "branch":
        return BranchRecipe(blocks=2, epochs=1, learning_rate=1e-3)
    if kind == "lora":
        return LoraRecipe(blocks=2, rank=2, warm_start=True, epochs=1, learning_rate=1e-3)
    return FullRecipe(epochs=1, learning_rate=1e-3)


def made(kind: str, folder: Path, place: Path, parts: tuple[Preferences, ...]) -> RewardEnsemble:
    return train(
        *parts,
        backbone=folder,
        members=2,
        recipe=recipe_of(kind),
        options=OPTIONS,
        out=place,
        cache_dir=place.parent / "cache",
    )


@pytest.fixture(scope="module", params=KINDS)
def trained(
    request: pytest.FixtureRequest, small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, RewardEnsemble, tuple[Preferences, ...]]:
    if request.param == "lora":
        pytest.importorskip("peft")
    place = tmp_path_factory.mktemp("start") / "run"
    parts = few_pairs(60)
    made(request.param, small_folder, place, parts)
    return request.param, RewardEnsemble.from_pretrained(place, device="cpu"), parts


Trained = tuple[str, RewardEnsemble, tuple[Preferences, ...]]


def test_without_learning_they_remain_what_they_were(trained: Trained, tmp_path: Path) -> None:
    """A learning rate near zero: what is left is where they start."""
    kind, ensemble, parts = trained
    request = TrainingRequest.of(ensemble)
    still = replace(request.recipe, learning_rate=1e-12)
    still = replace(still, weight_decay=(0.0,) if isinstance(still, HeadRecipe) else 0.0)  # type: ignore[call-arg]
    request = replace(request, recipe=still, seed=77, cache_dir=tmp_path / "cache")
    again = train_request(*parts, replace(request, out=tmp_path / "run"))
    samples = parts[1].samples()
    found, wanted = again.score(samples).raw, ensemble.score(samples).raw
    np.testing.assert_allclose(found, wanted, atol=2e-4 if kind == "full" else 1e-5)
    fresh = train_request(*parts, replace(request, start=None, out=tmp_path / "fresh"))
    assert np.abs(fresh.score(samples).raw - wanted).max() > 1e-3


def test_they_go_on_and_are_no_worse_where_they_may_stay(trained: Trained, tmp_path: Path) -> None:
    kind, ensemble, parts = trained
    request = TrainingRequest.of(ensemble)
    again = train_request(
        *parts, replace(request, seed=1, out=tmp_path / "run", cache_dir=tmp_path / "cache")
    )
    before, after = (np.array(e.provenance["validation_nll"]) for e in (ensemble, again))
    if kind != "full":
        assert (after <= before + 1e-6).all()
    assert again.provenance["start"] != ensemble.provenance.get("start")
    assert again.names == ensemble.names
    samples = parts[0].samples()
    moved = np.abs(again.score(samples).raw - ensemble.score(samples).raw).max(axis=0)
    if kind != "full":  # a member moved if it became better, and else stayed
        assert ((moved > 1e-6) == (after < before - 1e-7)).all()
    saved = RewardEnsemble.from_pretrained(tmp_path / "run", device="cpu")
    np.testing.assert_array_equal(saved.score(samples).raw, again.score(samples).raw)
    assert TrainingRequest.of(saved).recipe == request.recipe  # and may go on once more


def test_another_start_is_refused(small_folder: Path, tmp_path: Path) -> None:
    parts = few_pairs(60)
    heads = made("head", small_folder, tmp_path / "run", parts)
    request = replace(TrainingRequest.of(heads), cache_dir=None)
    for changes, what in (
        ({"recipe": BranchRecipe()}, "kind 'branch'"),
        ({"members": 3, "recipe": replace(recipe_of("head"), views=None)}, "3 members"),
        ({"recipe": replace(recipe_of("head"), views=("3:both",))}, "views"),
    ):
        with pytest.raises(OptionError, match=what):
            train_request(*parts, replace(request, **changes))  # type: ignore[arg-type]
    rule = FunctionScorer("length", lambda s: float(len(s.completion)))
    with pytest.raises(OptionError, match="how it was trained"):
        TrainingRequest.of(RewardEnsemble((rule,), Normaliser.identity(1), mean()))
