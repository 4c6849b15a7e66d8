"""Norms, rotary embedding and gated activation in fewer passes over memory, on a CPU.

transformers writes each as a chain of operators on whole tensors, which on a CPU take as long as
the matrix products. What stands here computes the same by fewer of them. It is put into single
modules, never into transformers' own, and only where it gave the module's own result on random
input. Wherever gradients are wanted, the module's own forward pass runs.
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
    """Give every module below these its quicker forward pass, where it has one and runs on a CPU.

    Copies of the modules have it, too.
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
    """Compare a module's own forward pass, in float32, with the quick one, in a dtype.

    The norm of the difference is at most `rtol` of the result's.
    """
    states = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = quick(copy.deepcopy(module).to(dtype), states).float()
    wanted = type(module).forward(copy.deepcopy(module).float(), states.float())
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).norm() <= rtol * wanted.norm())


# Norms ---------------------------------------------------------------------------------------


def _is_rms_norm(module: Any) -> bool:
    """Say whether it is an RMSNorm as Llama's: x/√(mean x² + ε), rounded, times the weight."""
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
    # A float32 state is its own float copy, and not ours to change.
    scaled = wide * scale if wide is states else wide.mul_(scale)
    return scaled.to(states.dtype).mul_(self.weight)


# Gated activation ----------------------------------------------------------------------------


def _gated(self: Any, states: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(
        self.act_fn(self.gate_proj(states)).mul_(self.up_proj(states))
    )
    return out


def _fused(self: Any, states: torch.Tensor) -> torch.Tensor:
    """Let oneDNN apply the activation and the gate while a product's result is at hand."""
    if not all(type(layer) is torch.nn.Linear for layer in (self.gate_proj, self.up_proj)):
        return _gated(self, states)  # such as one with an adapter
    gate, up = self.gate_proj, self.up_proj
    linear = torch.ops.mkldnn._linear_pointwise
    active = linear(states, gate.weight, gate.bias, "swish", [], "")
    out: torch.Tensor = self.down_proj(linear.binary(states, active, up.weight, up.bias, "mul"))
    return out


def _quick_gated(module: Any) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """Return the quickest that is equal here, by dtype and by what torch offers, if any is."""
    gate = module.gate_proj
    if not isinstance(gate, torch.nn.Linear) or not _agrees(module, _gated, gate.in_features):
        return None
    grid = torch.linspace(-8, 8, 65)
    silu = torch.allclose(module.act_fn(grid), torch.nn.functional.silu(grid), rtol=1e-5)
    if gate.weight.dtype != torch.bfloat16 or not silu:
        return _gated
    try:
        equal = _agrees(module, _fused, gate.in_features, dtype=torch.bfloat16, rtol=0.02)
    except (AttributeError, RuntimeError):  # not on this processor, or no longer in torch
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
    """Return transformers' function of the rotary embedding with a quicker one before it."""

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
    """Return an attention's forward pass that finds a quicker rotary embedding under its name.

    The code is transformers' own; the function that it calls stands in its globals, of which this
    one has a copy. None where it calls none, or another than the quicker one computes.
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
        agree = all(torch.allclose(one, two, rtol=1e-5, atol=1e-6) for one, two in pairs)
    except (TypeError, ValueError, RuntimeError):  # a function of another kind under that name
        return None
    if not agree:
        return None
    known = forward.__globals__ | {_ROTARY: quick}
    twin = types.FunctionType(
        code, known, forward.__name__, forward.__defaults__, forward.__closure__
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    return twin
