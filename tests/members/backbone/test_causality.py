"""Whether a model is causal is found by trying; sharing and masks follow from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from ensemble_rm import Sample, TrunkOptions
from ensemble_rm.members.backbone.checkpoint import load_tokenizer, locate
from ensemble_rm.members.backbone.trunk import Trunk, View, features, is_causal, keeps_a_cache

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CPU = torch.device("cpu")


def build(family: str, vocab_size: int = 64, **more: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, vocab_size=vocab_size, **more)
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "mistral", "gpt_neox"])
def test_decoders_are_causal(family: str) -> None:
    assert is_causal(build(family), CPU) and keeps_a_cache(build(family), CPU)


def test_a_decoder_that_looks_ahead_is_not() -> None:
    model = build("gemma3_text", use_bidirectional_attention=True)
    assert not is_causal(model, CPU)
    assert not keeps_a_cache(model, CPU)
    assert not is_causal(build("bert", type_vocab_size=2), CPU)


@pytest.mark.parametrize("small_folder", ["llama"], indirect=True)
def test_scores_of_a_bidirectional_decoder_do_not_depend_on_the_batch(
    small_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    size = len(load_tokenizer(small_folder))
    build("gemma3_text", size, use_bidirectional_attention=True).save_pretrained(folder)
    for file in small_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    trunk = Trunk(locate(folder, cache_dir=None), TrunkOptions(max_length=64, device="cpu"))
    assert not trunk.causal and not trunk.shares
    samples = [Sample("a prompt", "word " * n) for n in (1, 3, 9, 20)]
    encoded = trunk.encoder.encode(samples)
    views = [View(1, "both"), View(2, "mean")]
    together = features(trunk, encoded, views)
    alone = np.concatenate([features(trunk, [one], views) for one in encoded])
    np.testing.assert_allclose(together, alone, atol=1e-5)
