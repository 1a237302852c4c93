"""The low-rank part of one adapted layer, and its place among parallel ranks.

An adapter is a child module of the layer it adapts, added by a forward hook, so the layer keeps its own parameter
names. All its communication is on the low-rank activation:

    column-parallel layer [out/tp, in]:  A [dim, in] whole on every rank, B [out/tp, dim] split as the layer is
    row-parallel layer    [out, in/tp]:  A [dim, in/tp] split as the layer is, B [out, dim] whole

Shape suffixes in comments: t tokens, r the adapter's dim.
"""

import math
import zlib
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
        self._mark()

    def split_axes(self) -> dict[str, int | None]:
        """Of each parameter, the axis the tensor-parallel ranks split; None for one every rank holds whole."""
        return {
            "lora_a": None if self.column else 1,
            "lora_b": len(self.halves) - 1 if self.column else None,
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

    def _mark(self) -> None:
        """Tell Megatron how each parameter is split, so that it reduces and counts its gradient once."""
        axes = self.split_axes()
        parameters: dict[str, Any] = dict(self.named_parameters(recurse=False))
        for name, parameter in parameters.items():
            axis = axes[name]
            parameter.tensor_model_parallel = axis is not None and self.tp_group.size() > 1
            # Whole on every rank, but each rank's gradient comes from its slice of the sequence.
            parameter.sequence_parallel = axis is None and self.sequence_parallel
            parameter.allreduce = not self.is_expert

    @property
    def tp_group(self) -> ProcessGroup:
        """The ranks that split the adapted layer."""
        if self.is_expert:
            return expert_tensor_group()
        return cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """As `add_to`; what is hooked to modules, as Megatron's gathering of weights is, sees it."""
        return self.add_to(output, x)

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

    def parts(self) -> list["Adapter"]:
        """The adapters of single layers or experts that this one stands for."""
        return [self]

    def whole(self) -> list[Any]:
        """The parameters that every tensor-parallel rank holds whole."""
        return [getattr(self, name) for name, axis in self.split_axes().items() if axis is None]

    def sharded_state_dict(self) -> dict[str, ShardedTensor]:
        """This adapter's tensors with their place in the whole, by their key in a checkpoint."""
        found = (self.sharded(name, getattr(self, name)) for name in self.split_axes())
        return {each.key: each for each in found}

    def sharded(self, name: str, tensor: Tensor) -> ShardedTensor:
        """One tensor of this adapter with its place in the whole.

        Args:
            name: One of `names.TENSORS`.
            tensor: What it holds on this rank.
        """
        rank, size = self.tp_group.rank(), self.tp_group.size()
        if self.is_expert:
            copy = parallel_state.get_expert_data_parallel_rank()
        else:
            copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        axis = self.split_axes()[name]
        offsets = () if axis is None else ((axis, rank, size),)
        replica = (0, rank if axis is None else 0, copy)
        key = tensor_key(self.layer_name, name)
        return ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica)


def expert_tensor_group() -> ProcessGroup:
    """The ranks that split an expert's layers."""
    return cast(ProcessGroup, parallel_state.get_expert_tensor_parallel_group())
