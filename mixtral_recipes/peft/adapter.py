"""The low-rank part of one adapted layer, and its place among parallel ranks.

An adapter is a child module of the layer it adapts, added by a forward hook, so the layer keeps its own parameter
names. All its communication is on the low-rank activation:

    column-parallel layer [out/tp, in]:  A [dim, in] whole on every rank, B [out/tp, dim] split as the layer is
    row-parallel layer    [out, in/tp]:  A [dim, in/tp] split as the layer is, B [out, dim] whole

Shape suffixes in comments: t tokens, r the adapter's dim.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed import ProcessGroup

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.peft.names import tensor_key
from mixtral_recipes.settings.peft import LoRA


class Adapter(nn.Module):
    """The low-rank part of one adapted layer.

    Parameters: ``lora_a`` [dim, in] and ``lora_b`` [out, dim], split as the module docstring says; for a gated
    ``linear_fc1`` ``lora_b`` is [2, ffn, dim] (gate, up), so that its tensor-parallel axis is a plain one.

    Args:
        scheme: Rank, scale, dropout, initialisation.
        name: The adapted layer's name, layers and experts counted over all ranks.
        weight: The adapted layer's weight on this rank.
        column: Whether the layer is column-parallel (else row-parallel).
        config: The model's configuration.
        device: Where the parameters live; None takes the weight's.
    """

    def __init__(
        self,
        scheme: LoRA,
        name: str,
        weight: Tensor,
        *,
        column: bool,
        config: Any,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.column = column
        self.is_expert = ".experts." in name
        self.sequence_parallel = config.sequence_parallel and not self.is_expert
        self.scale = scheme.scale_of(name)
        self.dropout_position = scheme.dropout_position
        self.dropout = nn.Dropout(scheme.dropout)
        rows, columns = weight.shape
        self.halves = (2, rows // 2) if name.endswith("linear_fc1") and config.gated_linear_unit else (rows,)
        place = {"dtype": scheme.lora_dtype or weight.dtype, "device": device or weight.device}
        self.lora_a = nn.Parameter(torch.empty(scheme.dim_of(name), columns, **place))
        self.lora_b = nn.Parameter(torch.zeros(*self.halves, scheme.dim_of(name), **place))
        self._initialize(scheme)
        self._mark(self.split_axes())

    def split_axes(self) -> dict[str, int | None]:
        """Of each parameter, the axis the tensor-parallel ranks split; None for one every rank holds whole."""
        return {
            "lora_a": None if self.column else 1,
            "lora_b": self.lora_b.dim() - 2 if self.column else None,
        }

    def _initialize(self, scheme: LoRA) -> None:
        """Draw A from a generator seeded by the layer's name: the same start under every topology."""
        if self.lora_a.is_meta:
            return
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.layer_name}.adapter".encode()))
        whole = self.lora_a.shape[1] * (1 if self.column else self.tp_group.size())
        drawn = torch.empty(self.lora_a.shape[0], whole)
        if scheme.lora_A_init_method == "xavier":
            nn.init.xavier_normal_(drawn, generator=generator)
        elif scheme.lora_A_init_method == "uniform":
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        else:
            raise RecipeError(f"peft.lora_A_init_method={scheme.lora_A_init_method!r}; use 'xavier' or 'uniform'.")
        mine = drawn if self.column else drawn.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        self.lora_a.data.copy_(mine)

    def _mark(self, axes: dict[str, int | None]) -> None:
        """Tell Megatron how each parameter is split, so that it reduces and counts its gradient once."""
        for name, axis in axes.items():
            parameter = getattr(self, name)
            parameter.tensor_model_parallel = axis is not None and self.tp_group.size() > 1
            # Whole on every rank, but each rank's gradient comes from its slice of the sequence.
            parameter.sequence_parallel = axis is None and self.sequence_parallel
            parameter.allreduce = not self.is_expert

    @property
    def tp_group(self) -> ProcessGroup:
        """The ranks that split the adapted layer."""
        if self.is_expert:
            return _expert_tensor_group()
        return cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """The adapted layer's output.

        Args:
            output: The layer's own output, [..., out].
            x: The layer's input, [..., in] (or its slices, as the layer takes them).

        Returns:
            [..., out], laid out and typed as ``output``.
        """
        rows, factors = self._add_low_rank(output, x), self.factors()
        return rows if factors is None else rows * factors.to(rows.dtype)

    def _add_low_rank(self, output: Tensor, x: Tensor) -> Tensor:
        if self.dropout_position == "pre":
            x = self.dropout(x)
        low = self._share(F.linear(x.to(self.lora_a.dtype), self.lora_a))  # [t, r]
        b = self.lora_b.flatten(0, -2)
        if output.dtype == b.dtype and (self.dropout_position == "pre" or not self.dropout.p):
            rows = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), b.t(), alpha=self.scale)
            return rows.view_as(output)
        added = F.linear(low * self.scale, b)
        if self.dropout_position == "post":
            added = self.dropout(added)
        return output + added.to(output.dtype)

    def _share(self, low: Tensor) -> Tensor:
        """Communicate the low-rank activation over the tensor-parallel ranks.

        Experts communicate in Megatron's dispatcher instead: their tokens are gathered before and summed after.
        """
        if self.is_expert or self.tp_group.size() == 1:
            return low
        if self.column:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low)
            return copy_to_tensor_model_parallel_region(low)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low)
        return reduce_from_tensor_model_parallel_region(low)

    def factors(self) -> Tensor | None:
        """What each row of the adapted layer is multiplied by, [out], float32; None where rows keep their lengths."""
        return None

    def delta(self) -> Tensor:
        """scale * B A: shape and split of the layer's (local) weight, fp32."""
        return self.scale * (self.lora_b.flatten(0, -2).float() @ self.lora_a.float())

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        """This adapter's tensors with their place in the whole, by their key in a checkpoint."""
        rank, size = self.tp_group.rank(), self.tp_group.size()
        if self.is_expert:
            copy = parallel_state.get_expert_data_parallel_rank()
        else:
            copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        tensors = {}
        for name, axis in self.split_axes().items():
            key = tensor_key(self.layer_name, name)
            offsets = () if axis is None else ((axis, rank, size),)
            replica = (0, rank if axis is None else 0, copy)
            tensors[key] = ShardedTensor.from_rank_offsets(key, getattr(self, name), *offsets, replica_id=replica)
        return tensors


def adapters_of(model: Sequence[Any]) -> list[Adapter]:
    """Every adapter of a model, in module order."""
    return [module for chunk in model for module in chunk.modules() if isinstance(module, Adapter)]


def _expert_tensor_group() -> ProcessGroup:
    return cast(ProcessGroup, parallel_state.get_expert_tensor_parallel_group())


def reduce_expert_adapter_gradients(ddp: list[Any]) -> None:
    """Add up the gradients that expert-tensor-parallel ranks hold in part, over those ranks.

    An expert's layer is split over them, and each computes an unsplit factor's gradient from its part only. Megatron
    adds up such gradients for sequence parallelism, not here.

    Args:
        ddp: Model chunks in Megatron's DDP, gradients already reduced over data-parallel ranks.
    """
    group = _expert_tensor_group()
    if group.size() == 1:
        return
    partial = [
        getattr(adapter, name).main_grad
        for adapter in adapters_of(ddp)
        if adapter.is_expert
        for name, axis in adapter.split_axes().items()
        if axis is None
    ]
    if partial:
        together = _flatten_dense_tensors(partial)
        torch.distributed.all_reduce(together, group=group)
        for gradient, total in zip(partial, _unflatten_dense_tensors(together, partial), strict=True):
            gradient.copy_(total)
