"""The quicker kernels: transformers' own results, its own gradients, nothing where they differ."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ensemble_rm.members.backbone.checkpoint import load_trunk
from ensemble_rm.members.forward.cpu.kernels import quicken

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
LIKE_LLAMA = {"norm", "attention", "mlp"}
# Gemma's norm multiplies by 1 + weight; GLM's rotary embedding turns neighbours, not halves.
KINDS = {
    "Llama": LIKE_LLAMA,
    "Mistral": LIKE_LLAMA,
    "Qwen2": LIKE_LLAMA,
    "Qwen3": LIKE_LLAMA,
    "Gemma2": {"attention", "mlp"},
    "Glm": {"norm"},
}


def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SHAPE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}Model")(config)
        for name, p in model.named_parameters():
            if "norm" in name:  # which begin as ones or zeros
                torch.nn.init.normal_(p, 0.5, 0.3)
    return model.to(dtype).eval().requires_grad_(requires_grad=False)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(24).reshape(3, 8) % 49 + 1
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def quickened(model: torch.nn.Module) -> set[str]:
    """What kinds of modules have a forward pass of their own."""
    names = {type(m).__name__.lower() for m in model.modules() if "forward" in vars(m)}
    return {kind for kind in ("norm", "attention", "mlp") if any(kind in n for n in names)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_transformers_own(kind: str) -> None:
    plain, quick = make(kind), make(kind)
    quicken((quick,), CPU)
    assert quickened(quick) == KINDS[kind]
    with torch.inference_mode():
        one, two = (m(**batch()).last_hidden_state for m in (plain, quick))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_float32() -> None:
    exact = make("Llama").float()
    plain, quick = (make("Llama", torch.bfloat16) for _ in range(2))
    quicken((quick,), CPU)
    with torch.inference_mode():
        wanted = exact(**batch()).last_hidden_state
        gaps = [(m(**batch()).last_hidden_state - wanted).norm() for m in (plain, quick)]
    assert gaps[1] <= 1.5 * gaps[0]


def test_states_that_are_read_on_the_way_stay_as_they_were() -> None:
    model, seen = make("Llama"), []
    quicken((model,), CPU)
    for module in model.modules():
        module.register_forward_hook(
            lambda _m, args, out: seen.extend((x, x.clone()) for x in (*args, out) if _plain(x))
        )
    with torch.inference_mode():
        model(**batch())
    changed = [now for now, then in seen if not torch.equal(now, then)]
    # The activation and its gate are multiplied in place; nobody else holds them.
    assert all(x.shape[-1] == SHAPE["intermediate_size"] for x in changed)


def _plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def test_gradients_are_those_of_the_plain_forward_pass() -> None:
    plain, quick = make("Llama"), make("Llama")
    quicken((quick,), CPU)
    for model in (plain, quick):
        model.requires_grad_(requires_grad=True)
        model(**batch()).last_hidden_state.square().sum().backward()
    for one, two in zip(plain.parameters(), quick.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad) if one.grad is not None else two.grad is None


def test_copies_compute_with_their_own_weights() -> None:
    model = make("Llama")
    quicken((model,), CPU)
    twin = copy.deepcopy(model)
    for p in model.parameters():
        p.zero_()
    with torch.inference_mode():
        found, wanted = (m(**batch()).last_hidden_state for m in (twin, make("Llama")))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_activation_is_not_taken_for_silu(dtype: torch.dtype) -> None:
    config = transformers.LlamaConfig(**SHAPE, hidden_act="gelu")
    plain = transformers.LlamaModel(config).to(dtype).eval().requires_grad_(requires_grad=False)
    quick = copy.deepcopy(plain)
    quicken((quick,), CPU)
    with torch.inference_mode():
        one, two = (m.layers[0].mlp(torch.ones(2, 16, dtype=dtype)) for m in (plain, quick))
    assert torch.equal(one, two)


def test_nothing_is_changed_elsewhere(minilm_folder: Path) -> None:
    on_a_gpu, encoder = make("Llama"), load_trunk(minilm_folder, dtype="float32")
    quicken((on_a_gpu,), torch.device("cuda"))
    quicken((encoder,), CPU)
    assert not quickened(on_a_gpu) and not quickened(encoder)
    before = torch.get_rng_state()
    quicken((make("Llama"),), CPU)
    assert torch.equal(before, torch.get_rng_state())
    names = [n for n, v in vars(transformers.models.llama.modeling_llama).items() if callable(v)]
    module = transformers.models.llama.modeling_llama
    assert all(getattr(getattr(module, n), "__module__", "") != quicken.__module__ for n in names)
