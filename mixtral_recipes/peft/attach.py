"""Adapters attached to Megatron's linear layers, experts included, under any layout and either layer spec."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.peft import whole
from mixtral_recipes.peft.adapter import Adapter, expert_tensor_group
from mixtral_recipes.peft.dora import DoRAAdapter
from mixtral_recipes.peft.grouped import GroupedAdapter
from mixtral_recipes.peft.names import global_name
from mixtral_recipes.settings.peft import DoRA, LoRA


def apply(scheme: LoRA, model: Sequence[nn.Module]) -> None:
    """Freeze a model and attach adapters to it.

    Args:
        scheme: What is adapted, and how.
        model: This rank's model chunks, before DDP wraps them; weights loaded (DoRA measures them).

    Raises:
        RecipeError: an unknown layer name, or a layer or expert that the model does not have.
    """
    for chunk in model:
        config: Any = chunk.config
        scheme.check_against(config.num_layers, config.num_moe_experts)
        chunk.requires_grad_(False)
        whole.unfreeze(scheme, chunk)
    for chunk, name, layer in _matching_layers(scheme, model):
        _attach(scheme, chunk, name, layer)
    for chunk in model:
        # A first pipeline stage without an adapter still gets gradients from the next one.
        if chunk.pre_process and (chunk.config.recompute_granularity or not adapters_of([chunk])):  # pyright: ignore
            chunk.embedding.register_forward_hook(_want_gradient)  # pyright: ignore[reportAttributeAccessIssue]


def _matching_layers(scheme: LoRA, model: Sequence[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
    wanted = scheme.targets()
    for chunk in model:
        for name, module in list(chunk.named_modules()):
            if name.startswith("decoder.layers.") and name.rsplit(".", 1)[-1] in wanted:
                yield chunk, name, module


def _attach(scheme: LoRA, chunk: Any, name: str, layer: Any) -> None:
    kind = _kind(layer)
    if kind is None:
        raise RecipeError(f"peft cannot adapt {name}: {type(layer).__name__} is not supported.")
    make = functools.partial(adapter_class(scheme), scheme, column=kind == "column", config=layer.config)
    count = getattr(layer, "num_gemms", None)
    if count is None:
        own = global_name(chunk, name)
        if scheme.adapts(own):
            # A quantised layer's weight has no memory, so that it does not say where the adapter belongs.
            layer.adapter = make(own, layer.weight, device=getattr(layer, "device", None))
            layer.register_forward_hook(add_adapter)
    else:
        names = [global_name(chunk, name, expert) for expert in range(count)]
        chosen = {expert: own for expert, own in enumerate(names) if scheme.adapts(own)}
        if chosen:
            adapters = {expert: make(own, getattr(layer, f"weight{expert}")) for expert, own in chosen.items()}
            layer.adapter = GroupedAdapter(adapters)
            layer.register_forward_pre_hook(_enter_grouped_adapter)
            layer.register_forward_hook(_leave_grouped_adapter)


def adapter_class(scheme: LoRA) -> type[Adapter]:
    """The kind of adapter a scheme trains."""
    return DoRAAdapter if isinstance(scheme, DoRA) else Adapter


def adapters_of(model: Sequence[Any]) -> list[Adapter | GroupedAdapter]:
    """Every adapter of a model, in module order; those of a layer that computes several experts are one."""
    return [module for chunk in model for module in chunk.modules() if isinstance(module, Adapter | GroupedAdapter)]


def reduce_expert_adapter_gradients(ddp: list[Any]) -> None:
    """Add up the gradients that expert-tensor-parallel ranks hold in part, over those ranks.

    An expert's layer is split over them, and each computes an unsplit factor's gradient from its part only. Megatron
    adds up such gradients for sequence parallelism, not here.

    Args:
        ddp: Model chunks in Megatron's DDP, gradients already reduced over data-parallel ranks.
    """
    group = expert_tensor_group()
    if group.size() == 1:
        return
    partial = [factor.main_grad for adapter in adapters_of(ddp) if adapter.is_expert for factor in adapter.whole()]
    if partial:
        together = _flatten_dense_tensors(partial)
        torch.distributed.all_reduce(together, group=group)
        for gradient, total in zip(partial, _unflatten_dense_tensors(together, partial), strict=True):
            gradient.copy_(total)


def _want_gradient(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A recomputed layer gives no gradients unless its input wants one, and frozen embeddings' output does not."""
    return output.requires_grad_(torch.is_grad_enabled())


def add_adapter(layer: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """The hook of an adapted layer; code that computes the layer without calling it must add ``layer.adapter``."""
    return layer.adapter(output[0], args[0]), output[1]


def _enter_grouped_adapter(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, tokens_per_expert, *rest = args
    given, layer.adapter.unfinished = layer.adapter(x, tokens_per_expert)
    return given, tokens_per_expert, *rest


def _leave_grouped_adapter(layer: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    with_adapters, layer.adapter.unfinished = layer.adapter.unfinished, None
    return with_adapters(output[0]), output[1]


def _kind(layer: Any) -> str | None:
    """``"column"`` or ``"row"``; None for a layer that cannot be adapted.

    A layer that contains the norm hides the input that its adapter needs; with adapters, none are built that way
    (`models/layer_specs.py`).
    """
    if isinstance(layer, ColumnParallelLinear):
        return "column"
    if isinstance(layer, RowParallelLinear):
        return "row"
    # By name: importing Transformer Engine's classes where it is not used would load it.
    return {
        "TEColumnParallelLinear": "column",
        "TEColumnParallelGroupedLinear": "column",
        "TERowParallelLinear": "row",
        "TERowParallelGroupedLinear": "row",
    }.get(type(layer).__name__)
