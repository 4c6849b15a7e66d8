"""Faster norms, rotary embeddings and gated activations on a CPU, by fewer passes over memory.

transformers computes each by a chain of operators on whole tensors, which on a CPU take as long as
the matrix products. The functions here compute the same with fewer operators. They replace the
forward pass of single modules, never of transformers' classes, and only if they reproduce the
module's own result on random input. If gradients are enabled, the module's own forward pass runs.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch

from ensemble_rm.members.forward.cpu.grouped_attention import group_heads

_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ROTARY = "apply_rotary_pos_emb"


def use_cpu_kernels(model: Any, *others: torch.nn.Module) -> None:
    """Give a model on a CPU, and blocks that were taken from it, their quicker forward passes."""
    cpu = torch.device("cpu")
    group_heads(model, cpu)
    quicken((model, *others), cpu)


def quicken(modules: Iterable[torch.nn.Module], device: torch.device) -> None:
    """Install the faster forward passes in all submodules on a CPU that have one.

    Copies of the modules keep them.
    """
    if device.type != "cpu":
        return
    gated: dict[type, Callable[[Any, torch.Tensor], torch.Tensor] | None] = {}
    for module in (m for root in modules for m in root.modules()):
        if _is_rms_norm(module):
            _put(module, _rms_norm)
        elif {name for name, _ in module.named_children()} == _GATED:
            if type(module) not in gated:
                gated[type(module)] = _quick_gated(module)
            if (quick := gated[type(module)]) is not None:
                _put(module, quick)
        elif (rotated := _with_quick_rotary(type(module).forward)) is not None:
            module.forward = types.MethodType(rotated, module)


def _put(module: torch.nn.Module, quick: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    module.forward = types.MethodType(_unless_trained(quick), module)


@lru_cache
def _unless_trained(
    quick: Callable[[Any, torch.Tensor], torch.Tensor],
) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or states.device.type != "cpu":
            plain: torch.Tensor = type(self).forward(self, states)
            return plain
        return quick(self, states)

    return forward


@torch.inference_mode()
def _agrees(
    module: torch.nn.Module,
    quick: Callable[[Any, torch.Tensor], torch.Tensor],
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    rtol: float = 1e-5,
) -> bool:
    """Return whether the fast forward pass in `dtype` agrees with the module's own in float32.

    The norm of the difference must be at most `rtol` times that of the result.
    """
    states = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = quick(copy.deepcopy(module).to(dtype), states).float()
    expected = type(module).forward(copy.deepcopy(module).float(), states.float())
    if result.shape != expected.shape:
        return False
    return bool((result - expected).norm() <= rtol * expected.norm())


# Norms ---------------------------------------------------------------------------------------


def _is_rms_norm(module: Any) -> bool:
    """Say whether a module is an RMSNorm like Llama's: x/√(mean x² + ε), rounded, times weight."""
    if not hasattr(module, "variance_epsilon") or next(module.children(), None) is not None:
        return False
    parameters = dict(module.named_parameters())
    if list(parameters) != ["weight"] or parameters["weight"].ndim != 1:
        return False
    return _agrees(module, _rms_norm, len(parameters["weight"]))


def _rms_norm(self: Any, states: torch.Tensor) -> torch.Tensor:
    wide = states.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(wide.shape[-1]).add_(self.variance_epsilon).rsqrt_()
    # In float32, `wide` is the input itself, which must not be changed.
    scaled = wide * scale if wide is states else wide.mul_(scale)
    return scaled.to(states.dtype).mul_(self.weight)


# Gated activation ----------------------------------------------------------------------------


def _gated(self: Any, states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(
        self.act_fn(self.gate_proj(states)).mul_(self.up_proj(states))
    )
    return out


def _fused(self: Any, states: torch.Tensor) -> torch.Tensor:
    """Let oneDNN fuse the activation and the gate with the matrix products."""
    if not all(type(layer) is torch.nn.Linear for layer in (self.gate_proj, self.up_proj)):
        return _gated(self, states)  # a layer with an adapter, for example
    gate, up = self.gate_proj, self.up_proj
    linear = torch.ops.mkldnn._linear_pointwise
    active = linear(states, gate.weight, gate.bias, "swish", [], "")
    out: torch.Tensor = self.down_proj(linear.binary(states, active, up.weight, up.bias, "mul"))
    return out


def _quick_gated(module: Any) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """Return the fastest function that agrees with the module; None if none does."""
    gate = module.gate_proj
    if not isinstance(gate, torch.nn.Linear) or not _agrees(module, _gated, gate.in_features):
        return None
    grid = torch.linspace(-8, 8, 65)
    silu = torch.allclose(module.act_fn(grid), torch.nn.functional.silu(grid), rtol=1e-5)
    if gate.weight.dtype != torch.bfloat16 or not silu:
        return _gated
    try:
        equal = _agrees(module, _fused, gate.in_features, dtype=torch.bfloat16, rtol=0.02)
    except (AttributeError, RuntimeError):  # not supported by this processor or this torch
        return _gated
    return _fused if equal else _gated


# Rotary embedding ----------------------------------------------------------------------------


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head's states: (x₁·cos − x₂·sin, x₂·cos + x₁·sin)."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _quick_rotary(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a faster rotary embedding that falls back to transformers' own."""

    def rotary(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *args: Any,
        **kw: Any,
    ) -> Any:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1]
        if torch.is_grad_enabled() or q.device.type != "cpu" or args or kw or not whole:
            return plain(q, k, cos, sin, *args, **kw)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _rotated(q, cos, sin), _rotated(k, cos, sin)

    return rotary


@lru_cache
@torch.inference_mode()
def _with_quick_rotary(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return an attention's forward pass that calls the faster rotary embedding.

    The code is transformers' own. The rotary embedding is a global of its module, so the returned
    function has a copy of these globals with the faster one. None if the code calls no rotary
    embedding, or one that computes something else.
    """
    code = getattr(forward, "__code__", None)
    plain = getattr(forward, "__globals__", {}).get(_ROTARY)
    if code is None or plain is None or _ROTARY not in code.co_names:
        return None
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=draw) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 8, generator=draw) for _ in range(2))
    quick = _quick_rotary(plain)
    try:
        pairs = zip(quick(q, k, cos, sin), plain(q, k, cos, sin), strict=True)
        agree = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    except (TypeError, ValueError, RuntimeError):  # another function with the same name
        return None
    if not agree:
        return None
    names = forward.__globals__ | {_ROTARY: quick}
    twin = types.FunctionType(
        code, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    return twin
