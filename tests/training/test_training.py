"""Training: the loss's laws, seeds, planted heads, resume, leaks."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from ensemble_rm.errors import OptionError, TrainingError
from ensemble_rm.members import HeadRecipe
from ensemble_rm.members.heads.gradient_training import HeadTrainer
from ensemble_rm.members.heads.weights import HeadsResult, PairFeatures
from ensemble_rm.members.learning.loop import TrainingLoop
from ensemble_rm.members.learning.loss import preference_loss
from ensemble_rm.members.learning.seeds import global_seed, member_seeds

FLOATS = st.floats(-20, 20)


def loss(c: float, r: float, y: float, **options: float) -> float:
    tensors = (torch.tensor(v, dtype=torch.float64) for v in (c, r, y))
    return float(preference_loss(*tensors, **options))


@given(FLOATS, FLOATS, st.floats(0, 1), st.floats(-3, 3), st.floats(0, 0.5), st.floats(0, 0.1))
def test_the_loss_does_not_see_which_side_is_chosen(
    c: float, r: float, y: float, margin: float, smoothing: float, centring: float
) -> None:
    one = loss(c, r, y, margins=margin, smoothing=smoothing, centring=centring)
    two = loss(r, c, 1 - y, margins=-margin, smoothing=smoothing, centring=centring)
    assert one == pytest.approx(two, abs=1e-9)


@given(FLOATS, FLOATS, st.floats(0, 1))
def test_the_loss_is_the_cross_entropy_of_bradley_terry(c: float, r: float, y: float) -> None:
    # log σ(x) = −log(1 + e^(−x)), in Python's own floats, which lose no digit here.
    first, second = -math.log1p(math.exp(r - c)), -math.log1p(math.exp(c - r))
    assert loss(c, r, y) == pytest.approx(-(y * first + (1 - y) * second), rel=1e-9, abs=1e-12)


def test_centring_and_smoothing_by_hand() -> None:
    assert loss(1, 2, 1, centring=0.1) == pytest.approx(loss(1, 2, 1) + 0.9)
    assert loss(1, 2, 1, smoothing=0.2) == pytest.approx(0.9 * loss(1, 2, 1) + 0.1 * loss(1, 2, 0))


def test_members_seeds_differ_and_do_not_depend_on_how_many_there_are() -> None:
    few, many = member_seeds(3, 2), member_seeds(3, 8)
    assert few == many[:2]
    assert len({seed for member in many for seed in member.values()}) == 8 * 5


def test_a_global_seed_leaves_no_trace() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with global_seed(7):
        first = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    with global_seed(7):
        assert first == (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def planted(n: int, seed: int, views: int = 2, width: int = 12) -> PairFeatures:
    """Verdicts of a linear utility of the first view's features, through σ."""
    rng = np.random.default_rng(seed)
    x = rng.normal(3, 2, (2 * n, views, width)).astype(np.float32)
    w = np.random.default_rng(99).normal(size=width) * 0.4
    p = 1 / (1 + np.exp(-(x[:n, 0] - x[n:, 0]) @ w))
    y = (rng.random(n) < p).astype(float)
    return PairFeatures(x, y, np.ones(n), np.zeros(n), np.arange(n) // 2)


QUICK = HeadRecipe(
    solver="adam", epochs=12, learning_rate=0.01, weight_decay=(0.1, 10.0), patience=4
)


def trainer(recipe: HeadRecipe = QUICK, *, seed: int = 0, **options: Any) -> HeadTrainer:
    return HeadTrainer(
        planted(800, 1),
        planted(300, 2),
        **{"view_of": [0, 0, 1], "device": torch.device("cpu"), **options},
        recipe=recipe,
        seeds=member_seeds(seed, len(options.get("view_of", [0, 0, 1]))),
    )


def same(a: HeadsResult, b: HeadsResult) -> bool:
    return all(
        np.array_equal(x, b.weights.tensors()[name]) for name, x in a.weights.tensors().items()
    )


@pytest.mark.parametrize("hidden", [0, 8])
def test_a_planted_utility_is_found_by_the_view_that_shows_it(hidden: int) -> None:
    result = trainer(replace(QUICK, hidden=hidden)).run()
    test = planted(1000, 5)
    for member, view, low, high in ((0, 0, 0.75, 1), (1, 0, 0.75, 1), (2, 1, 0.4, 0.6)):
        scores = result.weights(member, test.features[:, view])
        share = ((scores[:1000] > scores[1000:]) == (test.targets > 0.5)).mean()
        assert low <= share <= high
    assert result.validation_nll[0] < 0.6 < result.validation_nll[2]


def test_seeds_make_members_differ_and_runs_repeat() -> None:
    one, two, other = trainer().run(), trainer().run(), trainer(seed=1).run()
    assert same(one, two)
    assert not same(one, other)
    assert not np.array_equal(one.weights.weight[0], one.weights.weight[1])


def test_losses_are_summed_so_that_members_do_not_share_their_learning_rate() -> None:
    """A member trained beside others is the member trained alone."""
    many = trainer(view_of=[0, 0, 0]).run()
    alone = trainer(view_of=[0]).run()
    np.testing.assert_allclose(many.weights.weight[0], alone.weights.weight[0], atol=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("hidden", [0, 4])
def test_a_killed_run_goes_on_to_the_same_weights(
    tmp_path: Path, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(QUICK, hidden=hidden)

    def kill(stage: str, done: int, total: int) -> None:
        if done == 7:
            raise Killed

    monkeypatch.setattr(TrainingLoop, "checkpoint_seconds", 0.0)
    options: dict[str, Any] = {"checkpoint": tmp_path, "digest": "d"}
    with pytest.raises(Killed):
        trainer(recipe, **options).run(progress=kill)
    assert (tmp_path / "checkpoint.safetensors").exists()
    with pytest.raises(TrainingError, match="another recipe"):
        trainer(recipe, **{**options, "digest": "other"}).run()
    seen: list[int] = []
    resumed = trainer(recipe, **options).run(progress=lambda s, done, t: seen.append(done))
    unbroken = trainer(recipe).run()
    assert seen[0] == 7
    assert same(resumed, unbroken)
    assert resumed.history == unbroken.history
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match="delete it"):
        trainer(checkpoint=tmp_path, digest="d").run()


def test_nan_stops_with_the_member_named() -> None:
    fit = planted(50, 1)
    fit.features[3, 0, 0] = np.nan
    with pytest.raises(TrainingError, match="member 0"):
        HeadTrainer(
            fit,
            planted(50, 2),
            view_of=[0],
            recipe=QUICK,
            seeds=member_seeds(0, 1),
            device=torch.device("cpu"),
        ).run()


def test_a_subspace_is_what_a_head_sees() -> None:
    result = trainer(replace(QUICK, subspace=0.5)).run()
    seen = result.weights.gain != 0
    assert seen.sum(axis=1).tolist() == [6, 6, 6]
    assert not np.array_equal(seen[0], seen[1])


def test_bootstrap_changes_what_members_learn_from() -> None:
    plain = trainer().run()
    resampled = trainer(replace(QUICK, bootstrap=True)).run()
    assert not same(plain, resampled)


@pytest.mark.parametrize(
    "bad",
    [{"epochs": 0}, {"learning_rate": 0}, {"weight_decay": ()}, {"smoothing": 1}, {"subspace": 0}],
)
def test_bad_recipes(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(bad))):
        HeadRecipe(**({"solver": "adam"} | bad))
