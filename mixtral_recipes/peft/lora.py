"""LoRA on Megatron's linear layers, experts included.

An adapter is a child module of the layer it adapts, added by a forward hook, so the layer keeps its own parameter
names. All its communication is on the low-rank activation:

    column-parallel layer [out/tp, in]:  A [dim, in] whole on every rank, B [out/tp, dim] split as the layer is
    row-parallel layer    [out, in/tp]:  A [dim, in/tp] split as the layer is, B [out, dim] whole

Shape suffixes in comments: t tokens, r the adapter's dim, h hidden.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mixtral_recipes.errors import RecipeError, nearest

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
            RecipeError: an unknown name.
        """
        wanted = PRESETS.get(self.target_modules, (self.target_modules,)) if isinstance(self.target_modules, str) else (
            self.target_modules
        )
        for name in (*wanted, *self.exclude_modules):
            if name not in ALL_LINEAR:
                raise RecipeError(f"peft.target_modules names {name!r}.{nearest(name, (*ALL_LINEAR, *PRESETS))}")
        return set(wanted) - set(self.exclude_modules)

    def apply(self, model: list[nn.Module]) -> list["Adapter"]:
        """Freeze a model and attach adapters to it.

        Args:
            model: This rank's model chunks, before DDP wraps them.

        Returns:
            The adapters, in module order.

        Raises:
            RecipeError: an unknown layer name, or no layer that matches.
        """
        for chunk in model:
            chunk.requires_grad_(False)
        adapters = [self._attach(name, layer) for name, layer in self._matching_layers(model)]
        if not adapters:
            raise RecipeError(f"peft.target_modules={self.target_modules!r} matches no layer of this model.")
        return adapters

    def _matching_layers(self, model: list[nn.Module]) -> Iterator[tuple[str, Any]]:
        wanted = self.targets()
        for chunk in model:
            for name, module in list(chunk.named_modules()):
                if name.rsplit(".", 1)[-1] in wanted and ".layers." in name:
                    yield _global_name(chunk, name), module

    def _attach(self, name: str, layer: Any) -> "Adapter":
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            raise RecipeError(f"peft cannot adapt {name}: {type(layer).__name__} is not supported.")
        adapter = Adapter(self, name, layer)
        layer.adapter = adapter  # pyright: ignore[reportAttributeAccessIssue]
        layer.register_forward_hook(_add_adapter)
        return adapter


def _add_adapter(layer: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return output[0] + layer.adapter(args[0]), output[1]


def _global_name(chunk: Any, name: str) -> str:
    """A layer's name with its layer and expert numbers counted over all ranks, as checkpoints name it."""
    found = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    assert found, name
    layer = chunk.decoder.layers[int(found[1])].layer_number - 1
    rest = found[2]
    expert = re.match(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", rest)
    if expert:
        experts = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        number = parallel_state.get_expert_model_parallel_rank() * experts + int(expert[1])
        rest = f"mlp.experts.{number}.{expert[2]}"
    return f"decoder.layers.{layer}.{rest}"


class Adapter(nn.Module):
    """The low-rank part of one adapted layer.

    Parameters: ``lora_a`` [dim, in] and ``lora_b`` [out, dim], split as the module docstring says; for ``linear_fc1``
    ``lora_b`` is [2, ffn, dim] (gate, up), so that its tensor-parallel axis is a plain one.
    """

    def __init__(self, scheme: LoRA, name: str, layer: Any) -> None:
        super().__init__()
        self.key = f"{name}.adapter"
        self.layer_name = name
        self.column = isinstance(layer, ColumnParallelLinear)
        self.is_expert = layer.is_expert
        self.sequence_parallel = layer.config.sequence_parallel and not layer.is_expert
        self.scale = scheme.alpha / scheme.dim
        self.dropout_position = scheme.dropout_position
        self.dropout = nn.Dropout(scheme.dropout)
        rows, columns = layer.weight.shape
        halves = (2, rows // 2) if name.endswith("linear_fc1") and layer.config.gated_linear_unit else (rows,)
        place = {"dtype": scheme.lora_dtype or layer.weight.dtype, "device": layer.weight.device}
        self.lora_a = nn.Parameter(torch.empty(scheme.dim, columns, **place))
        self.lora_b = nn.Parameter(torch.zeros(*halves, scheme.dim, **place))
        self._initialize(scheme)
        self._mark()

    def _initialize(self, scheme: LoRA) -> None:
        """Draw A from a generator seeded by the layer's name: the same start under every topology."""
        if self.lora_a.is_meta:
            return
        generator = torch.Generator().manual_seed(_stable_seed(self.key))
        whole = self.lora_a.shape[1] * (1 if self.column else self._tp_size())
        drawn = torch.empty(scheme.dim, whole)
        if scheme.lora_A_init_method == "xavier":
            nn.init.xavier_normal_(drawn, generator=generator)
        elif scheme.lora_A_init_method == "uniform":
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        else:
            raise RecipeError(f"peft.lora_A_init_method={scheme.lora_A_init_method!r}; use 'xavier' or 'uniform'.")
        mine = drawn if self.column else drawn.chunk(self._tp_size(), dim=1)[self._tp_rank()]
        self.lora_a.data.copy_(mine)

    @property
    def whole(self) -> nn.Parameter:
        """The factor every tensor-parallel rank holds whole; the other is split as the layer is."""
        return self.lora_a if self.column else self.lora_b

    def _mark(self) -> None:
        """Tell Megatron how each parameter is split, so that it reduces and counts its gradient once."""
        split, whole = (self.lora_b if self.column else self.lora_a), self.whole
        marks: list[tuple[nn.Parameter, str, Any]] = [
            (split, "tensor_model_parallel", self._tp_size() > 1),
            (whole, "tensor_model_parallel", False),
            (whole, "sequence_parallel", self.sequence_parallel),
            (split, "allreduce", not self.is_expert),
            (whole, "allreduce", not self.is_expert),
        ]
        for parameter, name, value in marks:
            setattr(parameter, name, value)

    def _tp_size(self) -> int:
        if self.is_expert:
            return parallel_state.get_expert_tensor_parallel_world_size()
        return parallel_state.get_tensor_model_parallel_world_size()

    def _tp_rank(self) -> int:
        if self.is_expert:
            return parallel_state.get_expert_tensor_parallel_rank()
        return parallel_state.get_tensor_model_parallel_rank()

    def forward(self, x: Tensor) -> Tensor:
        """The adapter's share of the layer's output.

        Args:
            x: The layer's input, [..., in] (or its slices, as the layer takes them).

        Returns:
            [..., out], laid out as the layer's output.
        """
        if self.dropout_position == "pre":
            x = self.dropout(x)
        low = nn.functional.linear(x.to(self.lora_a.dtype), self.lora_a)  # [t, r]
        low = self._share(low)
        out = nn.functional.linear(low, self.lora_b.flatten(0, -2)) * self.scale
        if self.dropout_position == "post":
            out = self.dropout(out)
        return out.to(x.dtype)

    def _share(self, low: Tensor) -> Tensor:
        """Communicate the low-rank activation over the tensor-parallel ranks.

        Experts communicate in Megatron's dispatcher instead: their tokens are gathered before and summed after.
        """
        if self.is_expert or self._tp_size() == 1:
            return low
        if self.column:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low)
            return copy_to_tensor_model_parallel_region(low)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low)
        return reduce_from_tensor_model_parallel_region(low)

    def delta(self) -> Tensor:
        """What the adapter adds to the layer's (local) weight: scale * B A, shape and split of the weight, fp32."""
        return self.scale * (self.lora_b.flatten(0, -2).float() @ self.lora_a.float())

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        """This adapter's tensors with their place in the whole, by their key in a checkpoint."""
        size, rank = self._tp_size(), self._tp_rank()
        copies = self._replica(rank)
        split_axis = {"lora_a": None if self.column else 1, "lora_b": self.lora_b.dim() - 2 if self.column else None}
        tensors = {}
        for name, axis in split_axis.items():
            key = f"{self.key}.{name}"
            offsets = () if axis is None else ((axis, rank, size),)
            replica = copies if axis is None else (copies[0], 0, copies[2])
            tensors[key] = ShardedTensor.from_rank_offsets(key, getattr(self, name), *offsets, replica_id=replica)
        return tensors

    def _replica(self, tp_rank: int) -> tuple[int, int, int]:
        if self.is_expert:
            return (0, tp_rank, parallel_state.get_expert_data_parallel_rank())
        return (0, tp_rank, parallel_state.get_data_parallel_rank(with_context_parallel=True))


def _stable_seed(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())


def reduce_expert_adapter_gradients(ddp: list[Any]) -> None:
    """Add up the gradients that expert-tensor-parallel ranks hold in part, over those ranks.

    An expert's layer is split over them, and each computes the adapter's unsplit factor's gradient from its part
    only. Megatron adds up such gradients for sequence parallelism, not here.

    Args:
        ddp: Model chunks in Megatron's DDP, gradients already reduced over data-parallel ranks.
    """
    group = parallel_state.get_expert_tensor_parallel_group()
    if group.size() == 1:
        return
    partial = [adapter.whole.main_grad for adapter in adapters_of(ddp) if adapter.is_expert]  # pyright: ignore[reportAttributeAccessIssue]
    if partial:
        together = _flatten_dense_tensors(partial)
        torch.distributed.all_reduce(together, group=group)
        for gradient, total in zip(partial, _unflatten_dense_tensors(together, partial), strict=True):
            gradient.copy_(total)


def adapters_of(model: list[nn.Module]) -> list[Adapter]:
    """Every adapter of a model, in module order."""
    return [module for chunk in model for module in chunk.modules() if isinstance(module, Adapter)]
