"""Text to tokens to features: templates, truncation, batches, views, parity with transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from ensemble_rm import FunctionScorer, Message, Sample, TrunkOptions, View
from ensemble_rm.errors import ModelError, NonFiniteScoreError, OptionError, StorageError
from ensemble_rm.members import HeadScorer
from ensemble_rm.members.backbone import trunk as trunks
from ensemble_rm.members.backbone.checkpoint import load_tokenizer, locate, torch_dtype
from ensemble_rm.members.backbone.feature_cache import FeatureCache
from ensemble_rm.members.backbone.trunk import (
    Rule,
    Trunk,
    default_views,
    features,
    features_in_parts,
    pool,
)
from ensemble_rm.members.encoding import TextEncoder, count_truncation
from ensemble_rm.members.forward.batching import plan
from ensemble_rm.members.scorer import check_scores, scorer_features
from tests.support.pooling import pooled

SENTENCE = "the quick brown fox jumps over a lazy dog and then sleeps near its warm den"
WORDS = SENTENCE.split()
DIALOGUE = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "Who are you?"))


def texts(n: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        Sample(
            " ".join(rng.choice(WORDS, rng.integers(1, 30))),
            " ".join(rng.choice(WORDS, rng.integers(1, 60))),
        )
        for _ in range(n)
    ]


@given(
    st.lists(st.integers(1, 600), max_size=80), st.integers(64, 4096), st.sampled_from([0.02, 0.1])
)
def test_batches_hold_each_row_once_within_the_budget(
    lengths: list[int], budget: int, cost: float
) -> None:
    groups = plan(lengths, token_budget=budget, cost=cost)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[r] for r in group) <= budget


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60), st.integers(600, 4096))
def test_cheaper_passes_leave_less_padding(lengths: list[int], budget: int) -> None:
    def padded(cost: float) -> int:
        groups = plan(lengths, token_budget=budget, cost=cost)
        return sum(len(group) * max(lengths[row] for row in group) for group in groups)

    assert sum(lengths) == padded(0.0) <= padded(0.02) <= padded(0.1)


@given(st.integers(1, 40), st.integers(1, 12))
def test_default_views_lie_in_the_upper_half_and_differ(depth: int, members: int) -> None:
    views = default_views(depth, members)
    assert len(views) == members
    lowest = max(1, depth // 2)
    assert all(lowest <= view.layer <= depth for view in views)
    layers = depth - lowest + 1
    assert len(set(views)) >= min(members, layers)
    assert View.parse(str(views[0])) == views[0]


@pytest.mark.parametrize("text", ["16", "a:mean", "3:max", ":last"])
def test_bad_views(text: str) -> None:
    with pytest.raises(OptionError, match="LAYER:POOLING"):
        View.parse(text)


def test_pooling_by_hand() -> None:
    states = torch.arange(24.0).reshape(2, 4, 3)
    starts, lengths = torch.tensor([1, 2]), torch.tensor([3, 4])
    last = pool(states, starts, lengths, "last")
    mean = pool(states, starts, lengths, "mean")
    assert last.tolist() == [states[0, 2].tolist(), states[1, 3].tolist()]
    assert mean.tolist() == [states[0, 1:3].mean(0).tolist(), states[1, 2:4].mean(0).tolist()]


def encoder(folder: Path, **options: Any) -> TextEncoder:
    return TextEncoder(load_tokenizer(folder), **{"max_length": 64, **options})


@pytest.mark.parametrize("sample", [Sample("Who are you?", "A fox."), Sample(DIALOGUE, "A fox.")])
def test_the_completion_begins_where_it_is_said_to(minilm_folder: Path, sample: Sample) -> None:
    e = encoder(minilm_folder)
    (found,) = e.encode([sample])
    assert e.tokenizer.decode(found.ids[found.start :]) == "a fox. [SEP]"


def test_truncation_keeps_the_completion_and_is_counted(minilm_folder: Path) -> None:
    long_prompt = Sample("fox " * 200, "a dog")
    long_answer = Sample("fox", "dog " * 200)
    e = encoder(minilm_folder)
    one, two = e.encode([long_prompt, long_answer])
    assert len(one.ids) == len(two.ids) == 64
    assert e.tokenizer.decode(one.ids[one.start :]) == "a dog [SEP]"
    assert (one.cut_completion, two.cut_prompt) == (0, 1)
    cut = count_truncation([one, two])
    assert (cut.samples, cut.prompts_cut, cut.completions_cut) == (2, 2, 1)


@pytest.fixture(scope="module")
def minilm(minilm_folder: Path) -> Trunk:
    return Trunk(locate(minilm_folder), TrunkOptions(max_length=128, device="cpu"))


def check_batch_invariance(trunk: Trunk, views: list[tuple[int, Rule]]) -> None:
    """Any order, batch size or neighbour gives the same feature."""
    samples = texts(24)
    encoded = trunk.encoder.encode(samples)
    together = pooled(trunk, encoded, views)
    alone = np.concatenate([pooled(trunk, [e], views) for e in encoded])
    order = np.random.default_rng(1).permutation(len(encoded))
    shuffled = pooled(trunk, [encoded[i] for i in order], views)
    spread = together.std(axis=0).mean()
    assert np.abs(together - alone).max() < 1e-4 * spread
    assert np.abs(together[order] - shuffled).max() < 1e-4 * spread


def check_parity(trunk: Trunk, folder: Path) -> None:
    """Every view equals what transformers' own hidden states give."""
    from transformers import AutoModel

    (e,) = trunk.encoder.encode([Sample("the quick fox", "jumps over a dog")])
    model = AutoModel.from_pretrained(folder).eval()
    inputs = {"input_ids": torch.tensor([e.ids])}
    if e.types is not None:
        inputs["token_type_ids"] = torch.tensor([e.types])
    with torch.inference_mode():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    for layer in (1, trunk.depth // 2, trunk.depth):
        found = pooled(trunk, [e], [(layer, "last"), (layer, "mean")])[0]
        states = hidden[layer][0].numpy()
        np.testing.assert_allclose(found[0], states[-1], atol=1e-4)
        np.testing.assert_allclose(found[1], states[e.start :].mean(0), atol=1e-4)


def test_encoder_features_do_not_depend_on_the_batch(minilm: Trunk) -> None:
    check_batch_invariance(minilm, [(3, "mean"), (6, "last")])


def test_encoder_parity_with_transformers(minilm: Trunk, minilm_folder: Path) -> None:
    check_parity(minilm, minilm_folder)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["left", "right"])
def test_decoder_features(smollm2_folder: Path, tmp_path: Path, padding: str) -> None:
    """A decoder whose tokenizer pads with its eos, on either side."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    for file in smollm2_folder.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, padding
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    trunk = Trunk(locate(folder), TrunkOptions(max_length=128, device="cpu"))
    assert trunk.encoder.template == "chat"
    (e,) = trunk.encoder.encode([Sample("Who are you?", "A fox.")])
    assert trunk.encoder.tokenizer.decode(e.ids[e.start :]).startswith("A fox.")
    check_batch_invariance(trunk, [(10, "mean"), (30, "last")])
    check_parity(trunk, folder)


@pytest.mark.slow
def test_a_gguf_folder_is_converted_once(smollm2_gguf_folder: Path, tmp_path: Path) -> None:
    one = locate(smollm2_gguf_folder, cache_dir=tmp_path)
    two = locate(smollm2_gguf_folder, cache_dir=tmp_path)
    assert one == two
    with pytest.raises(OptionError, match="cache_dir"):
        locate(smollm2_gguf_folder, cache_dir=None)


def test_blocks_above_the_highest_view_are_dropped(minilm_folder: Path, minilm: Trunk) -> None:
    low = Trunk(locate(minilm_folder), TrunkOptions(max_length=128, device="cpu"), top=3)
    assert (low.depth, len(low.blocks)) == (6, 3)
    encoded = low.encoder.encode(texts(5))
    views: list[tuple[int, Rule]] = [(2, "last"), (3, "mean")]
    np.testing.assert_allclose(
        pooled(low, encoded, views), pooled(minilm, encoded, views), atol=1e-6
    )


def test_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        locate("./nowhere")
    with pytest.raises(ModelError, match=r"config\.json"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="safetensors"):
        locate(tmp_path)
    with pytest.raises(ModelError, match="neither a local folder nor an available Hub model"):
        locate("nobody/no-such-model")  # the hub is off
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two").mkdir(exist_ok=True)
        (tmp_path / "two" / name).touch()
    with pytest.raises(ModelError, match="2 GGUF files"):
        locate(tmp_path / "two")
    (tmp_path / "two" / "b.gguf").unlink()
    with pytest.raises(OptionError, match="cache_dir"):
        locate(tmp_path / "two", cache_dir=None)
    with pytest.raises(OptionError, match="'float64'"):
        torch_dtype("float64")


class Counting:
    """A trunk that counts what it reads."""

    def __init__(self, trunk: Trunk) -> None:
        self.read = 0
        self._trunk = trunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)

    def passes(self, encoded: Any) -> Any:
        self.read += len(encoded)
        return self._trunk.passes(encoded)


def test_each_text_is_read_once(minilm: Trunk, tmp_path: Path) -> None:
    views = [View(3, "mean"), View(6, "last")]
    cache = FeatureCache(tmp_path)
    encoded = minilm.encoder.encode([*texts(10), *texts(10)])
    trunk: Any = Counting(minilm)
    one = features(trunk, encoded, views, cache=cache)
    assert trunk.read == 10
    two = features(trunk, encoded, views, cache=FeatureCache(tmp_path))
    assert trunk.read == 10
    assert (one == two).all()
    parts: list[tuple[int, Rule]] = [(3, "mean"), (6, "last")]
    np.testing.assert_allclose(one, pooled(minilm, encoded, parts), atol=1e-5)
    mixed = features(trunk, encoded, [View(3, "mean"), View(6, "both")], cache=cache)
    assert trunk.read == 20
    assert (mixed[:, 0, :384] == one[:, 0]).all()
    assert not mixed[:, 0, 384:].any()
    assert (mixed[:, 1, :384] == one[:, 1]).all()
    mean = pooled(minilm, encoded, [(6, "mean")])[:, 0]
    np.testing.assert_allclose(mixed[:, 1, 384:], mean, atol=1e-5)
    assert features(trunk, [], views).shape == (0, 2, 384)


def test_completions_of_a_prompt_are_read_together_and_some_samples_at_a_time(
    two_heads: Callable[..., HeadScorer], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = two_heads(max_length=96)
    trunk = scorer.trunk
    samples = [Sample(f"prompt {i % 3} " * 9, "fox " * (1 + i * 7 % 11)) for i in range(15)]
    encoded = trunk.encoder.encode(samples)
    views = [View(2, "last"), View(4, "mean")]
    whole = features(trunk, encoded, views)
    wanted = scorer.score(samples)
    prompts: list[int] = []
    read = trunks.read_prefix

    def counted(model: Any, given: Any, device: Any, **more: Any) -> Any:
        prompts.append(len(given))
        return read(model, given, device, **more)

    monkeypatch.setattr(trunks, "read_prefix", counted)
    monkeypatch.setattr(trunks, "_CHUNK", 8)
    parts = list(features_in_parts(trunk, encoded, views))
    assert sorted(np.concatenate([rows for rows, _ in parts])) == list(range(15))
    assert [len(rows) for rows, _ in parts] == [10, 5]
    assert sum(prompts) == (3 if trunk.shares else 0)  # each once, and not once a part
    for rows, found in parts:
        np.testing.assert_allclose(found, whole[rows], atol=1e-5)
    np.testing.assert_allclose(scorer.score(samples), wanted, atol=1e-4)
    one = [Sample("prompt " * 9, "fox " * (1 + i)) for i in range(20)]
    parts = list(features_in_parts(trunk, trunk.encoder.encode(one), views))
    assert max(len(rows) for rows, _ in parts) < 16


def test_a_full_cache_forgets_the_oldest(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=5 * 4 * 4)
    vectors = np.arange(32, dtype=np.float32).reshape(8, 4)
    keys = [bytes([i]) for i in range(8)]
    cache.put(keys, vectors)
    assert len(cache) == 5
    found = cache.get(keys)
    assert set(found) == set(keys[3:])
    assert (found[keys[7]] == vectors[7]).all()


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "features.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match="delete it"):
        FeatureCache(tmp_path)


def test_a_function_is_a_scorer() -> None:
    scorer = FunctionScorer("brevity", lambda s: -len(s.completion))
    samples = texts(3)
    found = check_scores(scorer, scorer.score(samples), 3)
    assert found[:, 0].tolist() == [-len(s.completion) for s in samples]
    with pytest.raises(OptionError, match="shape"):
        check_scores(scorer, found.T, 3)
    with pytest.raises(NonFiniteScoreError, match="brevity"):
        check_scores(scorer, np.full((3, 1), np.inf), 3)


def test_heads_show_the_features_that_they_score(two_heads: Callable[..., HeadScorer]) -> None:
    """The heads' weights on the features are the scores; other scorers have none."""
    scorer = two_heads()
    samples = [Sample(f"prompt {i % 3}", "word " * (1 + i % 5)) for i in range(9)]
    features = scorer.features(samples)
    assert features is not None
    assert features.shape == (9, 2 * 16)
    own = [scorer.weights(i, features[:, 16 * i : 16 * i + 16]) for i in range(2)]
    assert np.stack(own, axis=1) == pytest.approx(scorer.score(samples))
    rule = FunctionScorer("length", lambda sample: float(len(sample.completion)))
    both = scorer_features([rule, scorer, two_heads(seed=1)], samples)
    assert both is not None
    assert (both == np.concatenate([features, features], axis=1)).all()
    assert scorer_features([rule], samples) is None
    assert rule.features(samples) is None


def test_a_feature_of_several_samples_is_refused() -> None:
    class Short(FunctionScorer):
        def features(self, samples: object) -> np.ndarray:
            return np.zeros((1, 3))

    with pytest.raises(OptionError, match=r"'a' \(Short\) returned features"):
        scorer_features([Short("a", lambda sample: 0.0)], [Sample("p", "a"), Sample("p", "b")])


def test_heads_with_a_cache_are_the_same_heads(
    two_heads: Callable[..., HeadScorer], tmp_path: Path
) -> None:
    """And what one reads the next need not: a cache that is full asks nothing of the trunk."""
    samples = [Sample("Who?", "A fox " * n) for n in (1, 4, 2)]
    one, two = two_heads(seed=1), two_heads(seed=2)
    cache = FeatureCache(tmp_path)
    wanted = [one.score(samples), two.score(samples)]
    reading = [scorer.with_cache(cache) for scorer in (one, two)]
    np.testing.assert_allclose(reading[0].score(samples), wanted[0], atol=1e-6)
    reading[1].trunk.pool_batch = None  # type: ignore[assignment,method-assign]
    np.testing.assert_allclose(reading[1].score(samples), wanted[1], atol=1e-6)
    assert reading[1].names == two.names and reading[1].digest == two.digest
    assert reading[0].with_cache(None).cache is None and one.cache is None


def test_blocks_are_the_text_models_where_another_tower_is_as_deep() -> None:
    from transformers import Gemma3Config, Gemma3Model

    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = size | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32}
    vision = size | {"image_size": 28, "patch_size": 14}
    model = Gemma3Model(Gemma3Config(text_config=text, vision_config=vision))
    path, blocks = trunks.find_blocks(model)
    assert path == ("language_model", "layers")
    assert blocks is model.language_model.layers


def test_a_block_that_does_not_run_is_an_error(minilm_folder: Path) -> None:
    trunk = Trunk(locate(str(minilm_folder)), TrunkOptions(device="cpu"))
    trunk.blocks = torch.nn.ModuleList([torch.nn.Identity() for _ in trunk.blocks])
    batch = next(iter(trunk.passes(trunk.encoder.encode(texts(2)))))
    with pytest.raises(ModelError, match="did not run"):
        trunk.pool_batch(batch, [(1, "last")])
