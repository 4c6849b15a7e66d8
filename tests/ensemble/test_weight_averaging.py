"""The mean of members' weights: of branches and of full members, in Python and from a shell."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ensemble_rm import FunctionScorer, Preferences, RewardEnsemble, average_weights, train
from ensemble_rm.aggregation import lcb, mean
from ensemble_rm.calibration import Normaliser
from ensemble_rm.cli.main import main
from ensemble_rm.errors import DataError, ModelError, OneMemberError, OptionError
from ensemble_rm.members import BranchRecipe, BranchScorer, FullRecipe, FullScorer
from ensemble_rm.members.heads.weights import HeadWeights
from ensemble_rm.members.learning.averaging import average_tensors
from tests.support.small_runs import OPTIONS, SAMPLES, few_pairs


@pytest.fixture(scope="module")
def parts() -> tuple[Preferences, ...]:
    return few_pairs(120)


@pytest.fixture(scope="module")
def branches(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RewardEnsemble:
    recipe = BranchRecipe(epochs=1, batch_size=8, learning_rate=1e-3)
    cache = tmp_path_factory.mktemp("cache")
    given: dict[str, Any] = {"members": 3, "recipe": recipe, "options": OPTIONS}
    return train(*parts, backbone=small_folder, kind="branch", cache_dir=cache, **given)


@pytest.fixture(scope="module")
def full(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> RewardEnsemble:
    recipe = FullRecipe(epochs=1, batch_size=8, learning_rate=1e-3)
    out = tmp_path_factory.mktemp("full") / "run"
    given: dict[str, Any] = {"members": 2, "recipe": recipe, "options": OPTIONS}
    return train(*parts, backbone=small_folder, kind="full", cache_dir=None, out=out, **given)


def of(scorers: Sequence[Any]) -> RewardEnsemble:
    members = sum(len(scorer.names) for scorer in scorers)
    return RewardEnsemble(tuple(scorers), Normaliser.identity(members), mean())


def picked(scorer: BranchScorer, members: Sequence[int]) -> BranchScorer:
    """A scorer of some of the branches, in this order."""
    heads = {name: a[list(members)] for name, a in scorer.heads.tensors().items()}
    return BranchScorer(
        scorer.backbone,
        scorer.options,
        [scorer.views[i] for i in members],
        HeadWeights(**heads),
        [scorer.tensors[i] for i in members],
        blocks=scorer.blocks,
    )


def the_branches(ensemble: RewardEnsemble) -> BranchScorer:
    (scorer,) = ensemble.scorers
    assert isinstance(scorer, BranchScorer)
    return scorer


# Branches ----------------------------------------------------------------------------------------


def test_equal_branches_are_their_mean(branches: RewardEnsemble, parts: Any) -> None:
    scorer = the_branches(branches)
    merged = average_weights(of([picked(scorer, [1, 1, 1])]), parts[1])
    assert merged.names == ("merged",)
    for name, tensor in the_branches(merged).tensors[0].items():
        assert torch.equal(tensor, scorer.tensors[1][name])
    found = merged.score(SAMPLES).raw
    np.testing.assert_allclose(found, scorer.score(SAMPLES)[:, 1:2], rtol=1e-9)


def test_the_order_of_branches_does_not_count(branches: RewardEnsemble, parts: Any) -> None:
    one, two = picked(the_branches(branches), [2, 0]), picked(the_branches(branches), [1])
    two.names = ("other",)
    scores = average_weights(branches, parts[1]).score(SAMPLES)
    again = average_weights(of([one, two]), parts[1]).score(SAMPLES)
    np.testing.assert_allclose(again.raw, scores.raw, rtol=1e-5)


def test_untouched_blocks_under_merged_heads_score_the_mean(
    branches: RewardEnsemble, parts: Any
) -> None:
    scorer = the_branches(branches)
    same = copy.copy(scorer)
    same.tensors = [scorer.tensors[0]] * 3
    same._members = []
    same._branching = None
    merged = average_weights(of([same]), parts[1])
    wanted = same.score(SAMPLES).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(merged.score(SAMPLES).raw, wanted, rtol=1e-9)


def test_the_result_has_its_own_unit_and_no_uncertainty_and_is_saved(
    branches: RewardEnsemble, parts: Any, tmp_path: Path
) -> None:
    merged = average_weights(branches, parts[1], out=tmp_path / "merged")
    members = merged.score(parts[1].samples()).members
    assert abs(members.mean()) < 1e-6
    assert merged.calibration is None
    assert merged.provenance["merged"]["members"] == list(branches.names)
    with pytest.raises(OneMemberError):
        _ = merged.score(SAMPLES).std
    with pytest.raises(OneMemberError):
        merged.with_aggregator(lcb(kappa=1.0)).score(SAMPLES)
    again = RewardEnsemble.from_pretrained(tmp_path / "merged", device="cpu")
    np.testing.assert_array_equal(again.score(SAMPLES).reward, merged.score(SAMPLES).reward)


def test_branches_that_have_no_mean(
    branches: RewardEnsemble, parts: Any, small_folder: Path
) -> None:
    scorer = the_branches(branches)

    def refused(scorers: Sequence[Any], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            average_weights(of(scorers), parts[1])

    def changed(**changes: Any) -> BranchScorer:
        twin = picked(scorer, [0])
        twin.names = ("other",)
        vars(twin).update(changes)
        return twin

    two = picked(scorer, [1, 2])
    refused([picked(scorer, [0])], "its mean is itself")
    refused([two, changed(backbone=replace(scorer.backbone, digest="x"))], "differ in their backb")
    refused([two, changed(options=replace(OPTIONS, max_length=8))], "way to read text")
    refused([two, changed(views=(replace(scorer.views[0], pooling="last"),))], "differ in their vi")
    heads = picked(scorer, [0]).heads
    refused([two, changed(heads=replace(heads, gain=2 * heads.gain))], "without bootstrap")
    refused([two, changed(blocks=1)], "number of blocks")
    refused([two, FunctionScorer("rule", lambda s: 0.0)], "'FunctionScorer'")
    with pytest.raises(DataError):
        average_weights(branches, Preferences(()))


# Full members ------------------------------------------------------------------------------------


def models(ensemble: RewardEnsemble) -> list[FullScorer]:
    return [scorer for scorer in ensemble.scorers if isinstance(scorer, FullScorer)]


def test_full_members_know_their_start_and_have_a_mean(
    full: RewardEnsemble, parts: Any, tmp_path: Path
) -> None:
    scorers = models(full)
    assert scorers[0].start == scorers[1].start == full.provenance["backbone"]["digest"]
    merged = average_weights(full, parts[1], out=tmp_path / "merged")
    (scorer,) = models(merged)
    found = load_file(scorer.backbone.folder / "model.safetensors")
    one, two = (load_file(s.backbone.folder / "model.safetensors") for s in scorers)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-8)
    turned = average_weights(of(scorers[::-1]), parts[1], out=tmp_path / "turned")
    np.testing.assert_array_equal(turned.score(SAMPLES).raw, merged.score(SAMPLES).raw)
    again = RewardEnsemble.from_pretrained(tmp_path / "merged", device="cpu")
    np.testing.assert_array_equal(again.score(SAMPLES).raw, merged.score(SAMPLES).raw)
    with pytest.raises(OneMemberError):
        _ = again.score(SAMPLES).std


def test_equal_full_members_are_their_mean(
    full: RewardEnsemble, parts: Any, tmp_path: Path
) -> None:
    one = models(full)[0]
    twins = [copy.copy(one) for _ in range(3)]
    for i, twin in enumerate(twins):
        twin.names = (f"twin{i}",)
    merged = average_weights(of(twins), parts[1], out=tmp_path / "merged")
    np.testing.assert_array_equal(merged.score(SAMPLES).raw, one.score(SAMPLES))


def test_models_that_have_no_mean(
    full: RewardEnsemble, branches: RewardEnsemble, parts: Any, tmp_path: Path
) -> None:
    one, two = models(full)

    def refused(scorers: Sequence[Any], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            average_weights(of(scorers), parts[1], out=tmp_path / "merged")
        assert not (tmp_path / "merged").exists()

    def changed(**changes: Any) -> FullScorer:
        twin = copy.copy(two)
        vars(twin).update(changes)
        return twin

    refused([one, changed(start="x")], "starting checkpoint")
    refused([one, changed(start=None)], "does not say")
    refused([one, changed(own=False)], "does not say")
    refused([one, changed(pooling="other")], "pooling")
    refused([one], "its mean is itself")
    refused([one, *branches.scorers], "have a mean, not")
    other = tmp_path / "other"
    shutil.copytree(two.backbone.folder, other)
    (other / "model.safetensors").rename(other / "model-1.safetensors")
    refused([one, changed(backbone=replace(two.backbone, folder=other))], "weight files")
    with pytest.raises(OptionError, match="give out="):
        average_weights(full, parts[1])


def test_tensors_that_have_no_mean() -> None:
    with pytest.raises(ModelError, match="shape of w"):
        average_tensors("w", [torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ModelError, match="whole numbers 'ids'"):
        average_tensors("ids", [torch.arange(2), torch.zeros(2, dtype=torch.int64)])
    assert torch.equal(average_tensors("ids", [torch.arange(2)] * 2), torch.arange(2))
    half = average_tensors("w", [torch.tensor([1.0]).bfloat16(), torch.tensor([2.0]).bfloat16()])
    assert (half.dtype, half.item()) == (torch.bfloat16, 1.5)


def test_the_command(
    branches: RewardEnsemble, parts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, data = tmp_path / "run", tmp_path / "merged", tmp_path / "pairs.jsonl"
    branches.save_pretrained(run)
    data.write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in parts[1]))
    arguments = [f"--data={data}", f"--out={out}", "--device=cpu", "--json"]
    assert main(["average-weights", str(run), *arguments]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["members"] == list(branches.names)
    found = RewardEnsemble.from_pretrained(out, device="cpu").score(SAMPLES)
    np.testing.assert_array_equal(
        found.reward, average_weights(branches, parts[1]).score(SAMPLES).reward
    )
    assert main(["average-weights", str(out), *arguments]) == 4
    assert "its mean is itself" in capsys.readouterr().err
