"""LoRA members: untouched adapters, shared weights, seeds, diversity, warm start, resume, files."""

from __future__ import annotations

import builtins
import itertools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_rm import Preferences, RewardEnsemble, Sample, TrunkOptions, train
from ensemble_rm.errors import (
    DigestMismatchError,
    MissingExtraError,
    ModelError,
    OptionError,
    StorageError,
    TrainingError,
)
from ensemble_rm.members import (
    BranchRecipe,
    HeadRecipe,
    LoraOptions,
    LoraRecipe,
    LoraScorer,
    make_recipe,
)
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.branches.runner import Branching
from ensemble_rm.members.forward.batching import batches
from ensemble_rm.members.lora.adapters import (
    adapt,
    factors,
    merge_adapter,
    own_tensors,
    with_adapter,
)
from ensemble_rm.members.lora.diversity import alikeness, cosines
from ensemble_rm.training import TrainingRequest, plan
from tests.support.saved_files import record_digests
from tests.support.small_runs import OPTIONS, SAMPLES, Killed, check_untouched, few_pairs

QUICK = LoraRecipe(epochs=3, patience=9, batch_size=8, learning_rate=5e-3, rank=2, alpha=4)
SMALL = QUICK.adapter
FIELDS = {field.name for field in fields(LoraRecipe)}


@pytest.fixture(scope="module")
def parts() -> tuple[Preferences, ...]:
    return few_pairs(160)


def run(
    parts: tuple[Preferences, ...], folder: Path, cache: Path | None, **options: Any
) -> RewardEnsemble:
    """Train by QUICK; options that are a recipe's fields change that."""
    changes = {name: options.pop(name) for name in FIELDS & set(options)}
    given: dict[str, Any] = {"members": 2, "recipe": replace(QUICK, **changes), "options": OPTIONS}
    return train(*parts, backbone=folder, kind="lora", cache_dir=cache, **(given | options))


def the_scorer(ensemble: RewardEnsemble) -> LoraScorer:
    (scorer,) = ensemble.scorers
    assert isinstance(scorer, LoraScorer)
    return scorer


def filled(trunk: Trunk, lora: LoraOptions) -> torch.nn.ModuleList:
    """The trunk's upper blocks with an adapter that changes them."""
    own = adapt(trunk.rest, lora)
    for tensor in own_tensors(own).values():
        tensor.copy_(torch.linspace(-0.3, 0.2, tensor.numel()).view_as(tensor))
    return own.eval()


@pytest.mark.parametrize("blocks", [1, 4])
def test_a_fresh_adapter_changes_nothing(small_folder: Path, blocks: int) -> None:
    check_untouched(small_folder, blocks, lambda rest: adapt(rest, SMALL).eval())


@pytest.mark.parametrize("targets", [(), ("v_proj", "value")])
def test_adapters_share_the_blocks_and_merging_one_is_running_it(
    small_folder: Path, targets: tuple[str, ...]
) -> None:
    trunk = Trunk(locate(small_folder), OPTIONS, top=2)
    layers = {name.rpartition(".")[2] for name, _ in trunk.rest.named_modules()}
    lora = LoraOptions(rank=2, alpha=4, targets=tuple(t for t in targets if t in layers))
    own = filled(trunk, lora)
    before = torch.get_rng_state()
    twin = with_adapter(trunk.rest, lora, own_tensors(own))
    assert torch.equal(torch.get_rng_state(), before)
    base = {p.data_ptr() for p in trunk.rest.parameters()}
    for blocks in (own, twin):
        held = [p for name, p in blocks.named_parameters() if ".lora_" not in name]
        assert {p.data_ptr() for p in held} == base  # one copy of the backbone, whatever k is
    linear = sum("Linear" in str(type(m)) for m in trunk.rest.modules())
    assert len(factors(own)) == (2 if lora.targets else linear)
    branching = Branching(trunk)
    (batch,) = batches(trunk.encoder.encode(SAMPLES), token_budget=9999, device=trunk.device)
    states = branching.states(batch)
    with torch.inference_mode():
        scores = [
            branching.pooled(blocks, states, batch, "mean", width=trunk.width)
            for blocks in (own, twin, merge_adapter(trunk.rest, lora, own_tensors(own)), trunk.rest)
        ]
    assert torch.equal(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[0], scores[3], atol=1e-3)  # the base itself stands


def test_layers_that_store_their_weights_the_other_way_round_are_adapted() -> None:
    from transformers import GPT2Config, GPT2Model

    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50}
    config = GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    model = GPT2Model(config).eval().requires_grad_(requires_grad=False)
    own = adapt(model.h, SMALL).eval()
    assert len(factors(own)) == 8
    for tensor in own_tensors(own).values():
        tensor.copy_(torch.linspace(-0.3, 0.2, tensor.numel()).view_as(tensor))
    ids, found = torch.arange(6)[None], []
    for blocks in (model.h, own, merge_adapter(model.h, SMALL, own_tensors(own))):
        model.h = blocks
        with torch.inference_mode():
            found.append(model(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(found[1], found[2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


@pytest.mark.parametrize("blocks", [None, 2])
def test_training_learns_and_repeats_and_the_cache_changes_nothing(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path, blocks: int | None
) -> None:
    before = torch.get_rng_state()
    one = run(parts, small_folder, tmp_path, blocks=blocks)
    assert torch.equal(before, torch.get_rng_state())
    losses = [entry["train"] for entry in one.provenance["history"]]
    assert losses[-1][0] < losses[0][0]
    scores = one.score(SAMPLES).raw
    assert not np.allclose(scores[:, 0], scores[:, 1])
    again = run(parts, small_folder, None, blocks=blocks)
    np.testing.assert_array_equal(again.score(SAMPLES).raw, scores)
    assert any(tmp_path.glob("states-*")) == (blocks == 2)  # with all blocks, nothing is shared
    together = one.score(SAMPLES).raw
    alone = np.concatenate([one.score([sample]).raw for sample in SAMPLES])
    np.testing.assert_allclose(together, alone, atol=1e-4 * together.std())


@pytest.mark.parametrize("blocks", [None, 2])
def test_sharing_prompts_changes_no_score(
    parts: tuple[Preferences, ...], small_folder: Path, blocks: int | None
) -> None:
    scorer = the_scorer(run(parts, small_folder, None, blocks=blocks, warm_start=True))
    long = [Sample("Who are you? " * 4, "A fox " * n) for n in (1, 5, 3)]
    shared = scorer.with_options(replace(OPTIONS, max_length=64))
    plain = scorer.with_options(replace(OPTIONS, max_length=64, share_prefix=False))
    np.testing.assert_allclose(shared.score(long), plain.score(long), rtol=1e-4, atol=1e-5)
    assert shared.digest != scorer.digest
    branching, members = shared._open()
    found = branching.passes(branching.trunk.encoder.encode(long), members[0])
    decodes = "llama" in str(small_folder)
    assert any(batch.prefix is not None for batch in found) == decodes


def test_a_member_beside_others_is_the_member_alone(
    parts: tuple[Preferences, ...], small_folder: Path, tmp_path: Path
) -> None:
    many = run(parts, small_folder, tmp_path, members=3, blocks=2).score(SAMPLES).raw[:, 0]
    alone = run(parts, small_folder, tmp_path, members=1, blocks=2).score(SAMPLES).raw[:, 0]
    # Up to a constant: no pair says anything of a head's bias, so that it is led by rounding.
    np.testing.assert_allclose(many - many.mean(), alone - alone.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("warm_start", [False, True])
def test_save_and_load_are_identical(
    parts: tuple[Preferences, ...],
    small_folder: Path,
    minilm_folder: Path,
    tmp_path: Path,
    warm_start: bool,
) -> None:
    out = tmp_path / "run"
    ensemble = run(parts, small_folder, None, out=out, warm_start=warm_start)
    scores = ensemble.score(SAMPLES)
    again = RewardEnsemble.from_pretrained(out, device="cpu")
    assert (the_scorer(again).shared is not None) == warm_start
    np.testing.assert_array_equal(again.score(SAMPLES).raw, scores.raw)
    copied = RewardEnsemble.from_pretrained(again.save_pretrained(tmp_path / "copy"), device="cpu")
    np.testing.assert_array_equal(copied.score(SAMPLES).reward, scores.reward)
    stored = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    assert stored < (small_folder / "model.safetensors").stat().st_size  # adapters and heads only
    with pytest.raises(ModelError, match=r"the backbone in .* changed after it was saved"):
        RewardEnsemble.from_pretrained(out, backbone=minilm_folder)
    (out / "members/0/adapters.safetensors").write_bytes(b"")
    with pytest.raises(DigestMismatchError, match=r"adapters\.safetensors has 0 bytes"):
        RewardEnsemble.from_pretrained(out)
    record_digests(out)  # as if it had been saved like this
    with pytest.raises(StorageError, match="no saved lora member"):
        RewardEnsemble.from_pretrained(out)


def test_adapters_of_a_trunk_in_bfloat16_are_float32(
    parts: tuple[Preferences, ...], small_folder: Path
) -> None:
    options = TrunkOptions(max_length=32, device="cpu", dtype="bfloat16")
    scorer = the_scorer(run(parts, small_folder, None, options=options, members=1))
    assert {tensor.dtype for tensor in scorer.tensors[0].values()} == {torch.float32}
    assert np.isfinite(scorer.score(SAMPLES)).all()


@pytest.mark.parametrize("small_folder", ["llama"], indirect=True)
@pytest.mark.parametrize("at", [0, 1])  # the shared adapter, the members'
def test_a_killed_run_goes_on_to_the_same_weights(
    parts: tuple[Preferences, ...],
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    from ensemble_rm.members.learning.loop import TrainingLoop

    monkeypatch.setattr(TrainingLoop, "checkpoint_seconds", 0.0)
    given: dict[str, Any] = {"warm_start": True, "blocks": 2, "diversity": 0.1}
    stages: list[str] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage in ("training", "training shared adapter"):
            stages.append(stage)

    unbroken = run(parts, small_folder, tmp_path, progress=note, **given).score(SAMPLES).raw
    chosen, whole = list(dict.fromkeys(stages))[at], len(stages)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == chosen and done == total * 2 // 3 + 2:
            raise Killed

    out = tmp_path / "run"
    with pytest.raises(Killed):
        run(parts, small_folder, tmp_path, out=out, progress=kill, **given)
    with pytest.raises(TrainingError, match="another recipe"):
        run(parts, small_folder, tmp_path, out=out, seed=5, **given)
    stages.clear()
    again = run(parts, small_folder, tmp_path, out=out, progress=note, **given)
    assert len(stages) < whole  # it went on
    np.testing.assert_array_equal(again.score(SAMPLES).raw, unbroken)
    assert [p.name for p in tmp_path.iterdir() if "training" in p.name] == []


# Diversity ---------------------------------------------------------------------------------------


def draw(k: int, *, seed: int = 0) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Adapters of k members on two layers of other shapes."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    return [[(normal(2, 5), normal(7, 2)), (normal(2, 3), normal(4, 2))] for _ in range(k)]


def test_the_terms_cosines_are_those_of_the_flattened_updates() -> None:
    members = draw(4)
    flat = torch.stack([torch.cat([(b @ a).flatten() for a, b in one]) for one in members]).double()
    flat /= flat.norm(dim=1, keepdim=True)
    torch.testing.assert_close(cosines(members), flat @ flat.T, rtol=1e-5, atol=1e-6)
    nuclear = torch.linalg.svdvals(flat).sum()
    assert float(alikeness(members)) == pytest.approx(float(4 - nuclear), abs=1e-5)


def test_the_term_lies_between_orthogonal_and_equal_and_ignores_order_and_size() -> None:
    members = draw(3)
    term = float(alikeness(members))
    assert 0 < term < 3 - 3**0.5
    assert float(alikeness([members[0]] * 3)) == pytest.approx(3 - 3**0.5, abs=1e-4)
    for order in itertools.permutations(members):
        assert float(alikeness(order)) == pytest.approx(term, abs=1e-6)
    resized = [[(5 * a, 0.3 * b) for a, b in one] for one in members]
    assert float(alikeness(resized)) == pytest.approx(term, abs=1e-6)
    other = [(a[:, :0], b[:0]) for a, b in members[0]]
    assert float(alikeness([other])) == pytest.approx(1, abs=1e-5)


def test_the_term_is_finite_where_adapters_start() -> None:
    members = [[(a, torch.zeros_like(b).requires_grad_()) for a, b in one] for one in draw(3)]
    alikeness(members).backward()
    assert all(
        torch.isfinite(b.grad).all() for one in members for _, b in one if b.grad is not None
    )


def test_diversity_makes_adapters_less_alike_and_zero_is_off(
    parts: tuple[Preferences, ...],
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ensemble_rm.members.branches import gradient_training as branches
    from ensemble_rm.members.lora import training

    falling = itertools.count(0, -1)

    def last_is_best(self: Any, active: torch.Tensor) -> torch.Tensor:
        return torch.full((len(self.branches),), float(next(falling)))

    monkeypatch.setattr(branches.BranchTrainer, "validation_nll", last_is_best)

    def cosine(diversity: float) -> float:
        ensemble = run(parts, small_folder, tmp_path, diversity=diversity, members=3, blocks=1)
        scorer = the_scorer(ensemble)
        grown = [factors(blocks) for blocks in scorer._open()[1]]
        found = cosines(grown)
        return float(found[~torch.eye(3, dtype=torch.bool)].abs().mean())

    apart = cosine(3.0)
    with monkeypatch.context() as patch:
        patch.setattr(training, "alikeness", None)  # would fail where it is called
        plain = cosine(0.0)
    assert 0 < apart < 0.8 * plain


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 5}, "between 1 and 4"),
        ({"blocks": 0}, "between 1 and 4"),
        ({"views": ["2:last"]}, "after its last block"),
        ({"recipe": HeadRecipe()}, "of kind 'head', not of 'lora'; give a LoraRecipe"),
        ({"recipe": BranchRecipe()}, "of kind 'branch', not of 'lora'"),
        ({"targets": ("nothing",)}, "'nothing'"),
        ({"targets": "nothing"}, "'nothing'"),
        ({"members": 1, "diversity": 0.1}, "at least 2 members"),
    ],
)
def test_bad_options(
    parts: tuple[Preferences, ...], small_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        run(parts, small_folder, None, **options)


@pytest.mark.parametrize("kind", ["head", "branch", "full"])
def test_diversity_belongs_to_adapters(kind: str) -> None:
    message = f"diversity does not belong to kind '{kind}', but to 'lora'"
    with pytest.raises(OptionError, match=message):
        make_recipe(kind, diversity=0.1)


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}, {"dropout": 1.0}]
)
def test_bad_lora_options(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(bad))} must be"):
        LoraOptions(**({"rank": 1, "alpha": 1.0} | bad))
    name = next(iter(bad)).replace("dropout", "adapter_dropout")
    with pytest.raises(OptionError, match=f"{name} must be"):
        LoraRecipe(**{name: next(iter(bad.values()))})


def test_without_peft_the_extra_is_named(
    parts: tuple[Preferences, ...], small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"ensemble-rm\[lora\]"):
        run(parts, small_folder, None)


def test_a_plan_announces_the_size_of_the_states(
    parts: tuple[Preferences, ...], small_folder: Path
) -> None:
    def plan_of(blocks: int | None) -> dict[str, Any]:
        recipe = LoraRecipe(blocks=blocks)
        return plan(*parts, TrainingRequest(backbone=small_folder, recipe=recipe, options=OPTIONS))

    said = plan_of(1)
    assert said["token_states_bytes"] == said["tokens"] * 16 * 4
    said = plan_of(None)
    assert (said["recipe"]["blocks"], said["token_states_bytes"]) == (4, 0)
