"""Full members on transformers' Trainer: seeds, resume, pooling, save and load."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from ensemble_rm import Preferences, RewardEnsemble, Sample, TrunkOptions, train
from ensemble_rm.errors import OptionError, TrainingError
from ensemble_rm.members import FullRecipe, FullScorer, HeadRecipe
from tests.support.small_runs import OPTIONS, SAMPLES, Killed, few_pairs

QUICK = FullRecipe(epochs=2, batch_size=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def parts() -> tuple[Preferences, ...]:
    return few_pairs(120)


def run(
    parts: tuple[Preferences, ...], folder: Path, cache: Path | None, **options: Any
) -> RewardEnsemble:
    given: dict[str, Any] = {"members": 2, "recipe": QUICK, "options": OPTIONS}
    return train(*parts, backbone=folder, kind="full", cache_dir=cache, **(given | options))


def test_members_differ_and_runs_repeat_and_leave_no_trace(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    one = run(parts, small_folder, tmp_path / "one")
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    scores = one.score(SAMPLES).raw
    assert not np.allclose(scores[:, 0], scores[:, 1])
    torch.manual_seed(99)
    again = run(parts, small_folder, tmp_path / "two")
    np.testing.assert_array_equal(again.score(SAMPLES).raw, scores)
    alone = run(parts, small_folder, tmp_path / "three", members=1)
    np.testing.assert_allclose(alone.score(SAMPLES).raw, scores[:, :1], atol=1e-6)
    assert len(one.provenance["validation_nll"]) == 2


def test_save_and_load_are_identical_and_transformers_reads_them(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "run"
    ensemble = run(parts, small_folder, None, out=out)
    scores = ensemble.score(SAMPLES).raw
    assert [p.name for p in tmp_path.iterdir()] == ["run"]  # no checkpoint is left
    again = RewardEnsemble.from_pretrained(out, device="cpu")
    np.testing.assert_array_equal(again.score(SAMPLES).raw, scores)
    copied = RewardEnsemble.from_pretrained(again.save_pretrained(tmp_path / "copy"), device="cpu")
    np.testing.assert_array_equal(copied.score(SAMPLES).raw, scores)
    # What was trained by the mask is what transformers' own forward pass reads.
    model = AutoModelForSequenceClassification.from_pretrained(out / "members/0/model").eval()
    scorer = again.scorers[0]
    assert isinstance(scorer, FullScorer)
    for encoded, score in zip(scorer._open()[0].encode(SAMPLES), scores[:, 0], strict=True):
        inputs = {"input_ids": torch.tensor([encoded.ids])}
        if encoded.types is not None:
            inputs["token_type_ids"] = torch.tensor([encoded.types])
        with torch.inference_mode():
            assert model(**inputs).logits.item() == pytest.approx(score, abs=1e-4 * scores.std())


class Kill(TrainerCallback):
    """Dies in the second member's second epoch."""

    def __init__(self) -> None:
        self.ends = 0

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends += 1
        if self.ends == 4:
            raise Killed


@pytest.mark.parametrize("small_folder", ["llama"], indirect=True)
def test_a_killed_run_goes_on_to_the_same_weights(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    unbroken = run(parts, small_folder, tmp_path / "cache").score(SAMPLES).raw
    out = tmp_path / "run"
    with pytest.raises(Killed):
        run(parts, small_folder, None, out=out, recipe=replace(QUICK, callbacks=(Kill(),)))
    with pytest.raises(TrainingError, match="another recipe"):
        run(parts, small_folder, None, out=out, seed=5)
    seen: list[str] = []
    again = run(parts, small_folder, None, out=out, progress=lambda stage, d, t: seen.append(stage))
    assert set(seen) >= {"training member 1"}
    assert "training member 0" not in seen  # it was finished
    np.testing.assert_array_equal(again.score(SAMPLES).raw, unbroken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": FullRecipe(trainer_args={"seed": 3})}, "decided by"),
        ({"recipe": FullRecipe(trainer_args={"sead": 3})}, "has no 'sead'"),
        ({"recipe": HeadRecipe()}, "of kind 'head', not of 'full'; give a FullRecipe"),
    ],
)
def test_bad_options(
    parts: tuple[Preferences, ...],
    small_folder: Path,
    tmp_path: Path,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(OptionError, match=message):
        run(parts, small_folder, tmp_path, **options)


def test_the_models_need_a_folder(parts: tuple[Preferences, ...], small_folder: Path) -> None:
    with pytest.raises(OptionError, match="cache_dir"):
        run(parts, small_folder, None)


def test_nan_stops_by_name(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    wild = FullRecipe(epochs=4, learning_rate=1e38, clip=1e30, batch_size=8)
    with pytest.raises(TrainingError, match="learning_rate"):
        run(parts, small_folder, tmp_path, recipe=wild)


def test_the_head_of_a_bfloat16_model_runs_in_float32(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    options = TrunkOptions(max_length=32, device="cpu", dtype="bfloat16")
    ensemble = run(parts, small_folder, tmp_path, options=options, members=1)
    samples = [
        Sample("Who are you?", "fox " * n + "and dog " * m) for n in range(8) for m in range(8)
    ]
    raw = ensemble.score(samples[1:]).raw[:, 0]
    # Rounded to bfloat16, so many scores of one size could not all differ.
    rounded = torch.from_numpy(raw).bfloat16().double().numpy()
    assert len(np.unique(raw)) > len(np.unique(rounded))
