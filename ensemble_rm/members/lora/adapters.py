"""LoRA adapters on a trunk's top blocks: every member has its own, all share the blocks' weights.

A member's blocks copy the modules and share their weights; peft adds one adapter to each copy.
Adapters are never switched on and off, so that members cannot affect each other.
Must not know heads, losses or files.

References
----------
.. [1] Hu et al. 2021, arXiv 2106.09685: W + (alpha/rank)·B·A, B zero at the start.
"""

from __future__ import annotations

import copy

import torch
from torch.nn import ModuleList

from ensemble_rm.errors import MissingExtraError, OptionError
from ensemble_rm.members.lora.recipe import LoraOptions

_ADAPTER = "member"  # peft's name of the only adapter in each copy


def require_peft() -> None:
    """Raise `MissingExtraError` if peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "kind 'lora' needs the package `peft`: pip install 'ensemble-rm[lora]'"
        ) from error


def linear_layers(blocks: ModuleList, targets: tuple[str, ...] = ()) -> list[str]:
    """Return the names of the blocks' linear layers, or of those that end in a target.

    Raises
    ------
    OptionError
        If a target matches no layer, or the blocks have no linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    names = [
        name
        for name, module in blocks.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    ends = {
        name: {name.split(".", depth)[-1] for depth in range(name.count(".") + 1)} for name in names
    }
    for target in targets:
        if not any(target in suffixes for suffixes in ends.values()):
            last = sorted({name.rpartition(".")[2] for name in names})
            raise OptionError(
                f"no linear layer of the blocks is called {target!r}; choose from {last}"
            )
    if not names:
        raise OptionError(
            "the blocks have no linear layer that LoRA could adapt; use kind 'branch' or 'full'"
        )
    return [name for name in names if not targets or ends[name] & set(targets)]


def adapt(blocks: ModuleList, options: LoraOptions) -> ModuleList:
    """Return the blocks with a fresh adapter: new modules around the same weights.

    A is drawn from torch's global generator and B is zero, so that the blocks' outputs do not
    change. The adapter's weights are float32; only they are trainable.

    Raises
    ------
    MissingExtraError
        If peft is not installed.
    OptionError
        If a target names no linear layer.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    names = linear_layers(blocks, options.targets)
    own = share(blocks)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]
        target_modules=names,
        lora_dropout=options.dropout,
        fan_in_fan_out=not isinstance(own.get_submodule(names[0]), torch.nn.Linear),
    )
    inject_adapter_in_model(config, own, adapter_name=_ADAPTER)
    for name, p in own.named_parameters():
        if f".{_ADAPTER}." in name:
            p.data = p.data.float()
    return own


def share(blocks: ModuleList) -> ModuleList:
    """Return a copy of modules that shares every parameter and buffer."""
    tensors = [*blocks.parameters(), *blocks.buffers()]
    return copy.deepcopy(blocks, {id(tensor): tensor for tensor in tensors})


def own_tensors(blocks: ModuleList) -> dict[str, torch.Tensor]:
    """Return the adapter's weights by name, ``"0.….lora_A.weight"`` and ``lora_B``."""
    return {
        name.replace(f".{_ADAPTER}.", "."): p.detach()
        for name, p in blocks.named_parameters()
        if f".{_ADAPTER}." in name
    }


def own_parameters(blocks: ModuleList) -> list[torch.nn.Parameter]:
    """Return the parameters of the adapter."""
    return [p for name, p in blocks.named_parameters() if f".{_ADAPTER}." in name]


def with_adapter(
    blocks: ModuleList, options: LoraOptions, tensors: dict[str, torch.Tensor]
) -> ModuleList:
    """Return the blocks with an adapter of these weights, frozen; no generator is changed.

    Raises
    ------
    RuntimeError
        If the weights do not fit.
    """
    devices = {p.device for p in blocks.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        own = adapt(blocks, options)
    target = own_tensors(own)
    shapes = [{k: tuple(v.shape) for k, v in side.items()} for side in (target, tensors)]
    if shapes[0] != shapes[1]:
        different = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:2]
        raise RuntimeError(f"adapters of other names or shapes: {different}")
    for name, tensor in target.items():
        tensor.copy_(tensors[name])
    # Casts between a float32 adapter and bfloat16 blocks would take as long as the blocks.
    dtype = next(blocks.parameters()).dtype
    for name, p in own.named_parameters():
        if f".{_ADAPTER}." in name:
            p.data = p.data.to(dtype)
    return own.eval().requires_grad_(requires_grad=False)


def merge_adapter(
    blocks: ModuleList, options: LoraOptions, tensors: dict[str, torch.Tensor]
) -> ModuleList:
    """Return the blocks with an adapter's update added to their weights; all else is shared.

    Raises
    ------
    RuntimeError
        If the adapter's weights do not fit.
    """
    names = linear_layers(blocks, options.targets)
    own = share(blocks)
    if set(tensors) != {f"{name}.lora_{side}.weight" for name in names for side in "AB"}:
        raise RuntimeError(
            "the shared adapter belongs to other layers than the blocks' linear ones"
        )
    for name in names:
        layer = own.get_submodule(name)
        weight = layer.get_parameter("weight")
        a, b = (tensors[f"{name}.lora_{side}.weight"].to(weight.device) for side in "AB")
        update = b @ a * (options.alpha / options.rank)
        update = update if isinstance(layer, torch.nn.Linear) else update.T
        value = (weight.detach().float() + update).to(weight.dtype)
        layer.weight = torch.nn.Parameter(value, requires_grad=False)
    return own


def factors(blocks: ModuleList) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each adapted layer's A, (rank, in), and B, (out, rank), as they are trained."""
    named = {name: p for name, p in blocks.named_parameters() if f".{_ADAPTER}." in name}
    return [
        (p, named[name.replace(".lora_A.", ".lora_B.")])
        for name, p in named.items()
        if ".lora_A." in name
    ]
