"""A trunk has the checkpoint's weights, or is refused; none of them is a random number."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ensemble_rm.errors import ModelError
from ensemble_rm.members.backbone.checkpoint import load_causal, load_classifier, load_trunk

# Families of transformers' causal language models, as tiny as they build.
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2",
    "phi", "gpt2", "gpt_neox", "olmo2", "stablelm", "granite",
)  # fmt: skip
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64,
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 33, 7]])


def write(folder: Path, family: str = "llama") -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def rewrite(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@torch.inference_mode()
def states(folder: Path) -> torch.Tensor:
    found: torch.Tensor = load_trunk(folder, dtype="float32")(input_ids=IDS).last_hidden_state
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_causal_checkpoint_loads_as_it_is(family: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", family)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = whole.base_model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(states(folder), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."]
)
def test_names_that_wrappers_wrote_are_read(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "model")
    expected, torch_folder = states(folder), tmp_path / "wrapped"
    write(torch_folder)
    rewrite(torch_folder, lambda weights: {prefix + k: v for k, v in weights.items()})
    with caplog.at_level(logging.WARNING, logger="ensemble_rm"):
        torch.testing.assert_close(states(torch_folder), expected, rtol=0, atol=0)
    assert prefix in caplog.text
    load_causal(torch_folder, dtype="float32")


def test_an_unknown_prefix_or_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    rewrite(folder, lambda weights: {f"student.{k}": v for k, v in weights.items()})
    with pytest.raises(ModelError, match=r"lacks \d+ of the model's weights"):
        load_trunk(folder, dtype="float32")
    write(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda weights: {k: v for k, v in weights.items() if k != name})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_trunk(folder, dtype="float32")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_classifier(folder, dtype="float32", new_head=True)


def test_a_block_that_the_config_leaves_out_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 1
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="num_hidden_layers"):
        load_trunk(folder, dtype="float32")


def test_heads_and_poolers_may_be_absent(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    rewrite(folder, lambda weights: {k: v for k, v in weights.items() if "lm_head" not in k})
    states(folder)
    load_classifier(folder, dtype="float32", new_head=True)
    sizes = {**SIZES, "type_vocab_size": 2}
    config = transformers.AutoConfig.for_model("bert", **sizes)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    assert "bert.pooler.dense.weight" not in load_file(tmp_path / "bert/model.safetensors")
    states(tmp_path / "bert")
    load_classifier(tmp_path / "bert", dtype="float32", new_head=True)


def test_an_unfetched_or_cut_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", whole[:-100]):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="Git LFS"):
            load_trunk(folder, dtype="float32")
