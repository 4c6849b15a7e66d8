"""Branches: parity with the whole model, token states, seeds, resume, save and load."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_rm import Preferences, RewardEnsemble, TrunkOptions, train
from ensemble_rm.errors import (
    ModelError,
    OptionError,
    StorageError,
    TrainingError,
)
from ensemble_rm.members import BranchRecipe, BranchScorer, HeadRecipe
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.token_states import states_bytes, token_states
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.forward.batching import batches
from ensemble_rm.training import TrainingRequest, plan
from tests.support.small_runs import OPTIONS, SAMPLES, Killed, check_untouched, few_pairs

QUICK = BranchRecipe(blocks=2, epochs=3, patience=9, batch_size=8, learning_rate=1e-3)
FIELDS = {field.name for field in fields(BranchRecipe)}


@pytest.fixture(scope="module")
def parts() -> tuple[Preferences, ...]:
    return few_pairs(160)


def run(
    parts: tuple[Preferences, ...], folder: Path, cache: Path | None, **options: Any
) -> RewardEnsemble:
    """Train by QUICK; options that are a recipe's fields change that."""
    changes = {name: options.pop(name) for name in FIELDS & set(options)}
    given: dict[str, Any] = {"members": 2, "recipe": replace(QUICK, **changes), "options": OPTIONS}
    return train(*parts, backbone=folder, kind="branch", cache_dir=cache, **(given | options))


def check_copies(folder: Path, blocks: int) -> None:
    """Untouched copies of the top blocks are the model."""
    check_untouched(folder, blocks, lambda rest: rest)


@pytest.mark.parametrize("blocks", [1, 3])
def test_branches_of_untouched_blocks_are_the_model(small_folder: Path, blocks: int) -> None:
    check_copies(small_folder, blocks)


def test_a_real_encoders_branches_are_the_model(minilm_folder: Path) -> None:
    check_copies(minilm_folder, 2)


@pytest.mark.slow
def test_a_real_decoders_branches_are_the_model(smollm2_folder: Path) -> None:
    check_copies(smollm2_folder, 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_states_are_the_trunks(minilm_folder: Path, tmp_path: Path, dtype: str) -> None:
    trunk = Trunk(
        locate(minilm_folder), TrunkOptions(max_length=32, device="cpu", dtype=dtype), top=3
    )
    encoded = trunk.encoder.encode(SAMPLES)
    stored = token_states(trunk, encoded, tmp_path)
    size = states_bytes(encoded, width=trunk.width, dtype=dtype)
    assert stored.path.stat().st_size == size
    for batch in batches(encoded, token_budget=96, device=trunk.device):
        again, states = stored.batch(batch.rows)
        wanted = trunk.states(batch)
        inside = again.mask.bool()
        # The batch was another when they were stored: equal up to rounding.
        gap = (states.float() - wanted.float())[inside].abs().max()
        assert gap < (1e-4 if dtype == "float32" else 0.1) * wanted.float().std()
        assert not states[~inside].any()


def test_token_states_are_made_once_and_capped(minilm_folder: Path, tmp_path: Path) -> None:
    trunk: Any = Trunk(locate(minilm_folder), OPTIONS, top=3)
    encoded = trunk.encoder.encode(SAMPLES)
    size = states_bytes(encoded, width=trunk.width, dtype="float32")
    with pytest.raises(StorageError, match="states_limit"):
        token_states(trunk, encoded, tmp_path, max_bytes=size - 1)
    assert list(tmp_path.iterdir()) == []
    one = token_states(trunk, encoded, tmp_path, max_bytes=size)
    trunk.states = None  # would fail where it is called again
    assert token_states(trunk, encoded, tmp_path, max_bytes=size).path == one.path
    del trunk.states
    two = token_states(trunk, encoded[:3], tmp_path, max_bytes=size)
    assert list(tmp_path.iterdir()) == [two.path]  # the older one made room


def test_training_learns_and_repeats_and_the_cache_changes_nothing(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    one = run(parts, small_folder, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    losses = [entry["train"] for entry in one.provenance["history"]]
    assert len(losses) > 1
    assert losses[-1][0] < losses[0][0]
    scores = one.score(SAMPLES).raw
    assert not np.allclose(scores[:, 0], scores[:, 1])
    np.testing.assert_array_equal(run(parts, small_folder, None).score(SAMPLES).raw, scores)
    other = run(parts, small_folder, tmp_path, seed=1)
    assert not np.allclose(other.score(SAMPLES).raw, scores)


def test_a_member_beside_others_is_the_member_alone(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    many = run(parts, small_folder, tmp_path, members=3).score(SAMPLES).raw
    alone = run(parts, small_folder, tmp_path, members=1).score(SAMPLES).raw
    np.testing.assert_allclose(many[:, :1], alone, rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    ensemble = run(parts, small_folder, tmp_path, views=["4:last", "4:both"])
    together = ensemble.score(SAMPLES).raw
    alone = np.concatenate([ensemble.score([sample]).raw for sample in SAMPLES])
    np.testing.assert_allclose(together, alone, atol=1e-4 * together.std())


def test_save_and_load_are_identical(
    parts: tuple[Preferences, ...], small_folder: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    ensemble = run(parts, small_folder, tmp_path / "cache", out=tmp_path / "run")
    (scorer,) = ensemble.scorers
    assert isinstance(scorer, BranchScorer)
    scores = ensemble.score(SAMPLES)
    again = RewardEnsemble.from_pretrained(tmp_path / "run", device="cpu")
    np.testing.assert_array_equal(again.score(SAMPLES).raw, scores.raw)
    again.save_pretrained(tmp_path / "copy")
    copied = RewardEnsemble.from_pretrained(tmp_path / "copy", device="cpu")
    np.testing.assert_array_equal(copied.score(SAMPLES).reward, scores.reward)
    with pytest.raises(ModelError, match=r"the backbone in .* changed after it was saved"):
        RewardEnsemble.from_pretrained(tmp_path / "run", backbone=minilm_folder)


@pytest.mark.parametrize("small_folder", ["llama"], indirect=True)
def test_a_killed_run_goes_on_to_the_same_weights(
    parts: tuple[Preferences, ...],
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ensemble_rm.members.learning.loop import TrainingLoop

    monkeypatch.setattr(TrainingLoop, "checkpoint_seconds", 0.0, raising=False)
    unbroken = run(parts, small_folder, tmp_path).score(SAMPLES).raw
    steps: list[int] = []

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "training":
            steps.append(done)
            if done == total * 2 // 3 + 2:
                raise Killed

    out = tmp_path / "run"
    with pytest.raises(Killed):
        run(parts, small_folder, tmp_path, out=out, progress=kill)
    with pytest.raises(TrainingError, match="another recipe"):
        run(parts, small_folder, tmp_path, out=out, seed=5)
    more: list[int] = []

    def count(stage: str, done: int, total: int) -> None:
        if stage == "training":
            more.append(done)

    again = run(parts, small_folder, tmp_path, out=out, progress=count)
    assert len(more) < len(steps)  # it went on
    np.testing.assert_array_equal(again.score(SAMPLES).raw, unbroken)
    assert [p.name for p in tmp_path.iterdir() if "training" in p.name] == []


def test_nan_stops_with_the_member_named(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    wild = BranchRecipe(epochs=3, learning_rate=1e30, clip=1e30)
    with pytest.raises(TrainingError, match="member"):
        run(parts, small_folder, tmp_path, recipe=wild)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 4}, "between 1 and 3"),
        ({"blocks": 0}, "between 1 and 3"),
        ({"views": ["2:last"]}, "after its last block"),
        ({"recipe": HeadRecipe()}, "of kind 'head', not of 'branch'; give a BranchRecipe"),
        ({"weight_decay": (0.1, 1.0)}, "weight_decay must be one finite number"),
        ({"members": 0}, "at least 1"),
    ],
)
def test_bad_options(
    parts: tuple[Preferences, ...], small_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        run(parts, small_folder, None, **options)


def test_a_plan_announces_the_size_of_the_states(
    parts: tuple[Preferences, ...], small_folder: Path
) -> None:
    request = TrainingRequest(backbone=small_folder, recipe=BranchRecipe(blocks=1), options=OPTIONS)
    said = plan(*parts, request)
    assert said["token_states_bytes"] == said["tokens"] * 16 * 4
