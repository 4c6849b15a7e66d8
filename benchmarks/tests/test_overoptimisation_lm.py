"""The benchmark with real models: its sampler, labels, arms and scores, on small ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.overoptimisation import (
    curve_figures,
    lm_arms,
    lm_picture,
    lm_proxies,
    lm_sampling,
    lm_scores,
)
from ensemble_rm import Preference, Preferences, Sample, TrunkOptions, train
from ensemble_rm.members import BranchRecipe, HeadRecipe
from ensemble_rm.members.heads.scorer import HeadScorer


@pytest.fixture
def policy() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from uniform next tokens
    return model


# The sampler -----------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_softmax_says() -> None:
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, ::5] = -torch.inf
    n = 40_000
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # the quantiles themselves: no noise
    drawn = lm_sampling.draw(logits.expand(n, -1), even)
    counts = torch.bincount(drawn, minlength=700) / n
    assert (counts - logits.softmax(1)[0]).abs().max() < 2 / n + 1e-6
    assert counts[::5].sum() == 0


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(u: float) -> None:
    logits = torch.full((3, 513), -torch.inf)
    logits[0, [7, 300]], logits[1, 512], logits[2, [0, 255]] = 0.0, -3.0, 1.0
    drawn = lm_sampling.draw(logits, torch.full((3,), u, dtype=torch.float64))
    assert drawn.tolist() == ([7, 512, 0] if u == 0 else [300, 512, 255])


def test_the_sampler_continues_as_the_model_itself(policy: LlamaForCausalLM) -> None:
    prompts = torch.arange(10).view(2, 5) * 17 + 3
    own = torch.arange(6 * 4).view(6, 4) * 11 + 1  # three copies of each prompt, four tokens
    sampler = lm_sampling.Sampler(policy, eos=2)
    logits, cache = sampler.read(prompts, 3, 5)
    whole = torch.cat([prompts.repeat_interleave(3, dim=0), own], dim=1)
    with torch.inference_mode():
        wanted = policy(input_ids=whole).logits[:, 4:]
    torch.testing.assert_close(logits, wanted[:, 0], rtol=1e-4, atol=1e-4)
    for i in range(4):
        found = sampler.step(own[:, i], i, cache)
        torch.testing.assert_close(found, wanted[:, i + 1], rtol=1e-4, atol=1e-4)


def test_samples_end_where_the_policy_ends_them(policy: LlamaForCausalLM) -> None:
    sampler = lm_sampling.Sampler(policy, eos=9)
    policy.lm_head.weight.data[9] *= 4  # often the end
    prompts = torch.arange(6).view(1, 6)
    options = {"copies": 200, "tokens": 6}
    first, again = (
        sampler.sample(prompts, **options, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert torch.equal(first, again)
    ended = (first == 9).any(dim=1)
    assert 0 < ended.sum() < 200
    for row in first.tolist():
        end = row.index(9) + 1 if 9 in row else len(row)
        assert -1 not in row[:end] and set(row[end:]) <= {-1}


# Labels ----------------------------------------------------------------------------------------


def test_labels_follow_gold_and_flip_as_told() -> None:
    rng = np.random.default_rng(0)
    gold = 3 * rng.normal(size=(40_000, 2)) + 50 * rng.normal(size=(40_000, 1))
    unit = lm_proxies.within_unit(gold)
    assert unit == pytest.approx(3, rel=0.02)  # what prompts differ in does not count
    clean, noisy = (
        lm_proxies.first_wins(gold, unit, flipped=share, rng=np.random.default_rng(1))
        for share in (0.0, 0.25)
    )
    assert np.mean(clean != noisy) == pytest.approx(0.25, abs=0.01)
    near = np.abs((gold[:, 0] - gold[:, 1]) / 3 - 1) < 0.1  # a unit apart: σ(2)
    assert clean[near].mean() == pytest.approx(1 / (1 + np.exp(-2)), abs=0.03)


def test_seeds_and_parts_share_no_prompt() -> None:
    samples = [Sample(f"p{i}", f"{i} {side}") for i in range(60) for side in "ab"]
    gold = np.random.default_rng(0).normal(size=120)
    options = {"flipped": 0.0, "labels": lm_proxies.Labels(20, 10)}
    parts = [part for s in (0, 1) for part in lm_proxies.label(samples, gold, seed=s, **options)]
    assert [len(part) for part in parts] == [20, 10, 20, 10]
    prompts = [pair.prompt for part in parts for pair in part]
    assert len(set(prompts)) == 60
    for pair in parts[0]:
        assert {pair.chosen, pair.rejected} == {f"{str(pair.prompt)[1:]} {s}" for s in "ab"}


# Arms ------------------------------------------------------------------------------------------


def _members(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    sizes = {"single": 1, "heads": 5, "views": 5, "minilm": 5, "branch": 5, "middle": 5}
    return {kind: rng.normal(size=(n, k)) for kind, k in sizes.items()}


def test_no_arm_beats_the_oracle_and_all_begin_at_the_mean() -> None:
    rng = np.random.default_rng(0)
    gold = 7 + 3 * rng.normal(size=64)
    found = lm_arms.curves(_members(rng, 64), gold, [1, 2, 8, 64])
    wanted = {"single", "heads_mean", "heads_uwo", "views_mean", "views_uwo", "branch_uwo"}
    assert wanted | {"mixed_uwo", "oracle"} <= set(found)
    for curve in found.values():
        assert curve[0] == pytest.approx(0, abs=1e-12)
        assert (curve <= found["oracle"] + 1e-12).all()
    assert found["oracle"][-1] == pytest.approx((gold.max() - gold.mean()) / gold.std())


def test_members_that_agree_choose_as_one() -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(size=(32, 1))
    members = {"single": one, "views": np.repeat(one, 5, axis=1)}
    found = lm_arms.curves(members, rng.normal(size=32), [1, 4, 32])
    for arm in set(found) - {"oracle"}:
        np.testing.assert_allclose(found[arm], found["single"], atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(offsets=arrays(np.float64, 5, elements=st.floats(-5, 5)))
def test_a_members_own_offset_does_not_change_the_centred_choice(offsets: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    members = {"single": rng.normal(size=(20, 1)), "views": rng.normal(size=(20, 5))}
    moved = members | {"views": members["views"] + offsets}
    before, after = (lm_arms.proxies(m)["views_uwo_centred"][0] for m in (members, moved))
    np.testing.assert_allclose(before, after, atol=1e-9)


def test_intervals_count_what_seeds_share() -> None:
    curves = curve_figures.Curves
    rng = np.random.default_rng(0)
    prompts, seeds = 20, 4
    shared = np.tile(rng.normal(size=seeds), prompts)  # the seed's effect on every prompt
    rows = {"arm": np.stack([np.zeros(prompts * seeds), shared], axis=1)}
    crossed = curves(rows, grid=(prompts, seeds)).final("arm")
    loose = curves(rows).final("arm")
    assert crossed.value == loose.value
    assert crossed.high - crossed.low > 3 * (loose.high - loose.low)
    alone = curves(rows, grid=(prompts * seeds, 1)).final("arm")
    assert (alone.low, alone.high) == pytest.approx((loose.low, loose.high), rel=0.2)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_names_beside_curves_do_not_overlap(heights: list[float]) -> None:
    apart = lm_picture.apart
    found = np.array(apart(heights, 0.1))
    order = np.argsort(heights, kind="stable")
    assert (np.diff(np.sort(found)) > 0.1 - 1e-9).all()
    assert found.mean() == pytest.approx(np.mean(heights), abs=1e-9)
    distinct = np.diff(np.array(heights)[order]) > 1e-12
    assert (np.diff(found[order])[distinct] > 0).all()


# Scores ----------------------------------------------------------------------------------------

SAMPLES = [Sample(f"question {i % 3}?", f"answer {i}" + " and more" * (i % 4)) for i in range(12)]


def _pairs(start: int, n: int) -> Preferences:
    return Preferences(
        tuple(
            Preference(f"q{i}", f"a good answer {i}", f"bad {i}") for i in range(start, start + n)
        )
    )


def test_heads_read_from_a_file_score_as_the_ensemble_does(
    small_folder: Path, tmp_path: Path
) -> None:
    made = {
        name: train(
            _pairs(0, 12),
            _pairs(50, 6),
            backbone=small_folder,
            members=len(views),
            recipe=HeadRecipe(views=tuple(views)),
            options=TrunkOptions(max_length=32, device="cpu"),
            cache_dir=None,
        )
        for name, views in (("one", ["2:last"]), ("two", ["1:both", "2:both"]))
    }
    reader = lm_scores.HeadReader(made)
    file = tmp_path / "features.npy"
    for _ in range(2):  # read by the trunk, then from the file
        found = reader.score(SAMPLES, file)
        for name, ensemble in made.items():
            assert isinstance(ensemble.scorers[0], HeadScorer)
            wanted = ensemble.score(SAMPLES).members
            np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-4)


def test_branches_on_one_trunk_score_as_their_ensembles_do(small_folder: Path) -> None:
    made = {
        f"seed{seed}": train(
            _pairs(12 * seed, 12),
            _pairs(50, 6),
            backbone=small_folder,
            members=2,
            recipe=BranchRecipe(blocks=1, learning_rate=0.02),
            seed=seed,
            options=TrunkOptions(max_length=32, device="cpu"),
            cache_dir=None,
        )
        for seed in (0, 1)
    }
    found = lm_scores.apart(lm_scores.together(made).score(SAMPLES), made)
    for name, ensemble in made.items():
        wanted = ensemble.score(SAMPLES).members
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found["seed0"] - found["seed1"]).max() > 1e-3
