"""LoRA on Megatron's linear layers, experts included, under any layout and either layer spec."""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from mixtral_recipes.errors import RecipeError, nearest
from mixtral_recipes.peft.adapter import Adapter, GroupedAdapter, adapters_of, reduce_expert_adapter_gradients

__all__ = ["LoRA", "adapters_of", "reduce_expert_adapter_gradients"]

ALL_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
PRESETS = {"all-linear": ALL_LINEAR, "attention": ("linear_qkv", "linear_proj")}


@dataclass
class LoRA:
    """Low-rank adaptation: ``y = W x + alpha / dim * B A x``, only A and B trained.

    Attributes:
        target_modules: Megatron layer names, or a preset: ``"all-linear"`` (attention and every expert) or
            ``"attention"``.
        exclude_modules: Layer names left out again.
        dim: Rank (Hugging Face: ``r``).
        alpha: Scale numerator (Hugging Face: ``lora_alpha``).
        dropout: Probability, on the adapter's input or output.
        dropout_position: ``"pre"`` or ``"post"``.
        lora_A_init_method: ``"xavier"`` or ``"uniform"`` (Kaiming uniform, as peft).
        lora_B_init_method: ``"zero"``.
        lora_dtype: Dtype of A and B; None takes the layer's.
    """

    target_modules: list[str] | str = field(default_factory=lambda: list(ALL_LINEAR))
    exclude_modules: list[str] = field(default_factory=list)
    dim: int = 32
    alpha: int = 32
    dropout: float = 0.0
    dropout_position: str = "pre"
    lora_A_init_method: str = "xavier"
    lora_B_init_method: str = "zero"
    lora_dtype: torch.dtype | None = None

    def targets(self) -> set[str]:
        """The layer names this scheme adapts.

        Raises:
            RecipeError: an unknown name, or another unknown word.
        """
        wanted = self.target_modules
        if isinstance(wanted, str):
            wanted = PRESETS.get(wanted, (wanted,))
        for name in (*wanted, *self.exclude_modules):
            if name not in ALL_LINEAR:
                raise RecipeError(f"peft.target_modules names {name!r}.{nearest(name, (*ALL_LINEAR, *PRESETS))}")
        if self.dropout_position not in ("pre", "post"):
            raise RecipeError(f"peft.dropout_position={self.dropout_position!r}; use 'pre' or 'post'.")
        if self.lora_B_init_method != "zero":
            raise RecipeError(f"peft.lora_B_init_method={self.lora_B_init_method!r}; only 'zero' starts at the base.")
        return set(wanted) - set(self.exclude_modules)

    def apply(self, model: Sequence[nn.Module]) -> list[Adapter]:
        """Freeze a model and attach adapters to it.

        Args:
            model: This rank's model chunks, before DDP wraps them; weights loaded (DoRA measures them).

        Returns:
            The adapters, in module order.

        Raises:
            RecipeError: an unknown layer name, or no layer that matches.
        """
        for chunk in model:
            chunk.requires_grad_(False)
            if chunk.config.recompute_granularity and chunk.pre_process:  # pyright: ignore[reportAttributeAccessIssue]
                chunk.embedding.register_forward_hook(_want_gradient)  # pyright: ignore[reportAttributeAccessIssue]
        for chunk, name, layer in self._matching_layers(model):
            self._attach(chunk, name, layer)
        adapters = adapters_of(model)
        if not adapters and not any(len(chunk.decoder.layers) == 0 for chunk in model):  # pyright: ignore
            raise RecipeError(f"peft.target_modules={self.target_modules!r} matches no layer of this model.")
        return adapters

    def _matching_layers(self, model: Sequence[nn.Module]) -> Iterator[tuple[Any, str, Any]]:
        wanted = self.targets()
        for chunk in model:
            for name, module in list(chunk.named_modules()):
                if name.startswith("decoder.layers.") and name.rsplit(".", 1)[-1] in wanted:
                    yield chunk, name, module

    def _attach(self, chunk: Any, name: str, layer: Any) -> None:
        kind = _kind(layer)
        if kind is None:
            raise RecipeError(f"peft cannot adapt {name}: {type(layer).__name__} is not supported.")
        make = functools.partial(self.make_adapter, column=kind == "column", config=layer.config)
        count = getattr(layer, "num_gemms", None)
        if count is None:
            layer.adapter = make(_global_name(chunk, name), layer.weight)
            layer.register_forward_hook(_add_adapter)
        else:
            weights = [getattr(layer, f"weight{number}") for number in range(count)]
            names = [_global_name(chunk, name, expert) for expert in range(count)]
            layer.adapter = GroupedAdapter([make(n, weight) for n, weight in zip(names, weights, strict=True)])
            layer.register_forward_hook(_add_grouped_adapter)

    def make_adapter(self, name: str, weight: Tensor, *, column: bool, config: Any) -> Adapter:
        """The adapter of one weight; DoRA makes another kind."""
        return Adapter(self, name, weight, column=column, config=config)


def _want_gradient(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A recomputed layer gives no gradients unless its input wants one, and frozen embeddings' output does not."""
    return output.requires_grad_(torch.is_grad_enabled())


def _add_adapter(layer: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return layer.adapter.add_to(output[0], args[0]), output[1]


def _add_grouped_adapter(layer: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return layer.adapter.add_to(output[0], args[0], args[1]), output[1]


def _kind(layer: Any) -> str | None:
    """``"column"`` or ``"row"``; None for a layer that cannot be adapted.

    A layer with the norm inside hides the input its adapter needs: such are not built under adapters
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


def _global_name(chunk: Any, name: str, local_expert: int | None = None) -> str:
    """A layer's name with its layer and expert numbers counted over all ranks, as checkpoints name it.

    Args:
        chunk: The model chunk it is in.
        name: Its name there.
        local_expert: Which of a grouped layer's experts.
    """
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    assert found, name
    layer = chunk.decoder.layers[int(found[1])].layer_number - 1
    rest = found[2]
    expert = re.match(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?(.*)", rest)
    if expert:
        here = int(expert[1]) if local_expert is None else local_expert
        experts = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        number = parallel_state.get_expert_model_parallel_rank() * experts + here
        rest = f"mlp.experts.{number}.{expert[2]}"
    return f"decoder.layers.{layer}.{rest}"
