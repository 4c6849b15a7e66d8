"""Prefix sharing: the same scores, each prompt read once, nothing shared without a cache."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from transformers.cache_utils import Cache, DynamicLayer

from ensemble_rm import RewardEnsemble, Sample, TrunkOptions, load_preferences, train
from ensemble_rm.demo.data import FILE
from ensemble_rm.members import BranchScorer, FullScorer
from ensemble_rm.members.backbone.checkpoint import locate
from ensemble_rm.members.backbone.trunk import Trunk
from ensemble_rm.members.encoding import Encoded
from ensemble_rm.members.forward.batching import MIN_SAVED, group, passes
from ensemble_rm.members.forward.cpu import grouped_attention as attention
from ensemble_rm.members.full.scorer import classifier_scores
from tests.support.pooling import pooled

OPTIONS = TrunkOptions(max_length=96, device="cpu", token_budget=256)
ALONE = replace(OPTIONS, share_prefix=False)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "sleeps",
    "near",
    "its",
    "warm",
    "den",
]


def samples(prompts: int = 5, seed: int = 0) -> list[Sample]:
    """Groups of one to six completions over prompts of several lengths, in a random order."""
    rng = np.random.default_rng(seed)
    found = [
        Sample(prompt, " ".join(rng.choice(WORDS, rng.integers(1, 20))))
        for prompt in (" ".join(rng.choice(WORDS, rng.integers(3, 50))) for _ in range(prompts))
        for _ in range(rng.integers(1, 7))
    ]
    return [found[i] for i in rng.permutation(len(found))]


def check_parity(folder: Path) -> None:
    """Heads on shared and on unshared features agree within 1e-4 of a score's deviation."""
    shared, alone = (Trunk(locate(folder), options) for options in (OPTIONS, ALONE))
    assert shared.shares and not alone.shares
    encoded = shared.encoder.encode(samples())
    parts: Any = [(1, "mean"), (shared.depth - 1, "last"), (shared.depth, "last")]
    parts.append((shared.depth, "mean"))
    one, two = (pooled(t, encoded, parts).astype(np.float64) for t in (shared, alone))
    gain = 1 / (two.std(axis=0) + 1e-12)
    weight = np.random.default_rng(1).normal(size=two.shape[1:])
    gaps = np.abs(np.einsum("npw,pw,pw->np", one - two, gain, weight)).max(axis=0)
    scores = np.einsum("npw,pw,pw->np", two, gain, weight)
    assert (gaps < 1e-4 * scores.std(axis=0)).all(), gaps / scores.std(axis=0)


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def decoder(
    request: pytest.FixtureRequest, minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Small decoders; the second attends to 8 tokens, the third does in half its blocks."""
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    name = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2"}[request.param]
    more = {} if request.param == "llama" else {"sliding_window": 8}
    if request.param == "gemma2":
        more |= {"head_dim": 8, "query_pre_attn_scalar": 8}
    config = getattr(transformers, f"{name}Config")(**shape, **more, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_sharing_changes_no_feature(decoder: Path) -> None:
    check_parity(decoder)


@pytest.mark.slow
def test_sharing_changes_no_feature_of_a_real_decoder(smollm2_folder: Path) -> None:
    check_parity(smollm2_folder)


def test_branches_share_too(decoder: Path, tmp_path: Path) -> None:
    parts = load_preferences(FILE)[:60].split(0.5, 0.25, seed=0)
    ensemble = train(
        *parts, backbone=decoder, kind="branch", members=2, options=OPTIONS, cache_dir=tmp_path
    )
    (scorer,) = ensemble.scorers
    assert isinstance(scorer, BranchScorer)
    asked = samples()
    one = scorer.score(asked)
    two = scorer.with_options(ALONE).score(asked)
    assert np.abs(one - two).max() < 1e-4 * two.std()


def test_a_classifier_shares_too(decoder: Path, tmp_path: Path) -> None:
    parts = load_preferences(FILE)[:60].split(0.5, 0.25, seed=0)
    ensemble = train(
        *parts, backbone=decoder, kind="full", members=1, options=OPTIONS, cache_dir=tmp_path
    )
    (scorer,) = ensemble.scorers
    assert isinstance(scorer, FullScorer)
    asked = samples()
    two = scorer.with_options(ALONE).score(asked)
    for pooling in ("attended", "published"):
        scorer.pooling = pooling  # type: ignore[assignment]
        assert np.abs(scorer.score(asked) - two).max() < 1e-4 * two.std()


def test_a_completion_of_pad_tokens_alone_shares_no_prompt_and_stops_no_other(
    decoder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=1)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path)
    shared = FullScorer.from_name(tmp_path, OPTIONS)
    encoded = shared._open()[0].encode(samples())
    encoded = [replace(e, types=None) for e in encoded]
    encoded.insert(3, replace(encoded[0], ids=[*encoded[0].ids[: encoded[0].start], 0, 0]))
    scores, sharing = np.empty((2, len(encoded))), set()
    for i, scorer in enumerate((shared, shared.with_options(ALONE))):
        opened = scorer._open()[1]
        for batch in scorer._passes(encoded, opened):
            with torch.inference_mode():
                scores[i, batch.rows] = classifier_scores(opened, batch, "published").numpy()
            if batch.prefix is not None:
                sharing |= set(batch.rows)
    assert np.abs(scores[0] - scores[1]).max() < 1e-4 * scores[1].std()
    assert sharing and 3 not in sharing


def test_each_prompt_is_read_once(decoder: Path) -> None:
    trunk = Trunk(locate(decoder), OPTIONS)
    encoded = trunk.encoder.encode([Sample("the quick fox " * 5, f"dog {w}") for w in WORDS])
    seen = []
    hook = trunk.blocks[0].register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].shape[0] * args[0].shape[1])
    )
    assert trunk.shares and trunk.splits is not None  # the model is asked now, not while it reads
    seen.clear()
    pooled(trunk, encoded, [(4, "last")])
    hook.remove()
    prompt = encoded[0].start
    assert sum(seen) <= prompt + sum(len(e.ids) - prompt for e in encoded) + len(encoded)


def test_nobody_runs_the_last_block_of_a_prompt_to_its_end(decoder: Path) -> None:
    trunk = Trunk(locate(decoder), OPTIONS)
    encoded = trunk.encoder.encode([Sample("the quick fox " * 5, f"dog {w}") for w in WORDS])
    ended: dict[int, list[int]] = {0: [], 3: []}
    for block, widths in ended.items():
        trunk.blocks[block].register_forward_hook(
            lambda _m, args, _o, widths=widths: widths.append(args[0].shape[1])
        )
    splits = trunk.splits
    for widths in ended.values():
        widths.clear()
    pooled(trunk, encoded, [(4, "last")])
    prompt = encoded[0].start
    assert prompt in ended[0]
    assert (prompt in ended[3]) != splits


def test_an_encoder_shares_nothing_and_says_so(
    minilm_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="ensemble_rm"):
        assert not Trunk(locate(minilm_folder), OPTIONS).shares
    assert "no prefix is shared" in caplog.text


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 30)), max_size=40),
    st.integers(32, 300),
    st.booleans(),
)
def test_each_sample_comes_once_and_continues_its_own_prompt(
    rows: list[tuple[int, int, int]], budget: int, splits: bool
) -> None:
    from ensemble_rm.members.forward.prefix_cache import Prefix, padded

    encoded = [
        Encoded([prompt + 1] * (4 * prompt + 1) + [tail] * length, 4 * prompt + 1)
        for prompt, tail, length in rows
    ]
    device = torch.device("cpu")

    def read(prompts: list[list[int]]) -> Prefix:
        ids, mask = padded(prompts, device, right=splits)
        return Prefix(ids, mask, mask.sum(1), Cache(layers=[]), splits=splits)

    seen = []
    for batch in passes(encoded, token_budget=budget, device=device, read=read, splits=splits):
        seen += batch.rows
        for i, row in enumerate(batch.rows):
            own = batch.ids[i, : int(batch.lengths[i])].tolist()
            if batch.prefix is not None and batch.owners is not None:
                owner = int(batch.owners[i])
                kept = batch.prefix.mask[owner].bool()
                own = batch.prefix.ids[owner][kept].tolist() + own
            assert own == encoded[row].ids
    assert sorted(seen) == list(range(len(encoded)))
    groups, alone = group(encoded)
    for members in groups:
        assert (len(members) - 1) * encoded[members[0]].start >= MIN_SAVED
    assert len(alone) + sum(map(len, groups)) == len(encoded)


def test_a_saved_ensemble_keeps_its_choice(small_folder: Path, tmp_path: Path) -> None:
    parts = load_preferences(FILE)[:60].split(0.5, 0.25, seed=0)
    train(
        *parts, backbone=small_folder, members=2, options=ALONE, cache_dir=None, out=tmp_path / "r"
    )
    (scorer,) = RewardEnsemble.from_pretrained(tmp_path / "r", device="cpu").scorers
    assert scorer.options.share_prefix is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_attention_is_that_over_repeated_heads(dtype: torch.dtype) -> None:
    from ensemble_rm.members.forward.cpu.grouped_attention import grouped_attention

    with torch.random.fork_rng():
        torch.manual_seed(0)
        query = torch.randn(3, 6, 5, 8).to(dtype)
        key, value = torch.randn(3, 2, 9, 8).to(dtype), torch.randn(3, 2, 9, 8).to(dtype)
        mask = torch.rand(3, 1, 5, 9) < 0.7
    mask[..., 0] = True
    found, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    k, v = (x.double().repeat_interleave(3, dim=1) for x in (key, value))
    weights = (query.double() @ k.mT * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
    wanted = (weights @ v).transpose(1, 2)
    atol = 1e-6 if dtype == torch.float32 else 0.02
    np.testing.assert_allclose(found.double().numpy(), wanted.numpy(), atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cascade_attention_is_that_over_prompt_and_completion(dtype: torch.dtype) -> None:
    from ensemble_rm.members.forward.cpu.cascade_attention import SharedPrompts, cascade_attention

    owners, lengths = torch.tensor([1, 1, 1, 0, 2]), torch.tensor([4, 9, 1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        query = torch.randn(5, 5, 6, 8).to(dtype).transpose(1, 2)
        key, value = (torch.randn(5, 2, 5, 8).to(dtype) for _ in range(2))
        layer = DynamicLayer()
        layer.keys, layer.values = (torch.randn(3, 2, 9, 8).to(dtype) for _ in range(2))
    prompts = SharedPrompts.of([layer], lengths, owners)
    assert prompts.runs == [(1, 9, 3), (0, 4, 1), (2, 1, 1)]
    found = cascade_attention(query, key, value, prompts, 0, 0.3)
    keys, values = (
        torch.cat([of_prompts[owners], own], dim=2).double().repeat_interleave(3, dim=1)
        for of_prompts, own in ((layer.keys, key), (layer.values, value))
    )
    mask = torch.ones(5, 1, 5, 14, dtype=torch.bool).tril(9)
    places = torch.arange(14)
    mask &= (places < lengths[owners][:, None, None, None]) | (places >= 9)
    weights = (query.double() @ keys.mT * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
    atol = 1e-6 if dtype == torch.float32 else 0.03
    wanted = (weights @ values).transpose(1, 2)
    np.testing.assert_allclose(found.double().numpy(), wanted.numpy(), atol=atol)


def test_attention_in_parts_is_taken_where_it_can_be(
    decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = Trunk(locate(decoder), OPTIONS)
    model = type(trunk.model).__name__
    assert trunk.splits == (model == "LlamaModel")  # the others have windows
    calls = []
    plain = attention.cascade_attention
    monkeypatch.setattr(
        attention, "cascade_attention", lambda *args: calls.append(1) or plain(*args)
    )
    long = [Sample("the quick fox " * 8, w) for w in WORDS]
    pooled(trunk, trunk.encoder.encode(long), [(4, "last")])
    assert bool(calls) == trunk.splits


def test_a_model_that_hands_nothing_down_does_not_split(decoder: Path) -> None:
    trunk = Trunk(locate(decoder), OPTIONS)
    if trunk.model.config._attn_implementation == attention.NAME:
        trunk.model.set_attn_implementation("sdpa")  # whose attention knows no shared prompts
    assert trunk.shares and not trunk.splits


@pytest.mark.parametrize("budget", [48, 512])
def test_prompts_of_many_passes_are_held_together(decoder: Path, budget: int) -> None:
    shared, alone = (
        Trunk(locate(decoder), replace(OPTIONS, share_prefix=share, token_budget=budget))
        for share in (True, False)
    )
    samples = [
        Sample(f"{prompt} quick fox " * (3 + i), word)
        for i, prompt in enumerate(WORDS)
        for word in WORDS[:3]
    ]
    found, wanted = (
        pooled(t, t.encoder.encode(samples), [(3, "last"), (4, "mean")]) for t in (shared, alone)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)
