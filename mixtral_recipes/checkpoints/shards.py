"""Where each tensor of this rank lies in the whole model's: what is written to a checkpoint and read from one.

Megatron's own reshardable form gathers the optimizer on one rank of each data-parallel group to save it, and names it
after the chain of optimizers a layout happens to have, so that it cannot be read where the experts are split otherwise.
Here a rank's contiguous part of a parameter's state is cut into boxes of the whole tensor: nothing is exchanged, and
any layout reads what it needs.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mixtral_recipes.checkpoints.format.shard import Shape, Shard
from mixtral_recipes.checkpoints.fp8 import StandIn
from mixtral_recipes.checkpoints.remainders import Remainder
from mixtral_recipes.peft import whole
from mixtral_recipes.peft.attach import adapters_of
from mixtral_recipes.peft.names import is_adapters


def model_state(model: list[Any], *, adapters_only: bool) -> dict[str, Any]:
    """Megatron's sharded state dict of a model, or of its adapters.

    Args:
        model: This rank's chunks, without DDP.
        adapters_only: Whether only the adapters' tensors are wanted, and what is trained whole beside them (or only
            the base's, without adapters).
    """
    state: dict[str, Any] = {}
    if adapters_only:
        for chunk in model:
            state |= whole.sharded_state(chunk)
        return state | {key: value for a in adapters_of(model) for key, value in a.sharded_state_dict().items()}
    for number, chunk in enumerate(model):
        for name, value in chunk.sharded_state_dict(prefix="").items():
            # Transformer Engine's states are empty but for delayed scaling's, which `fp8_state` saves; adapters are
            # saved by their own keys.
            if not name.endswith("_extra_state") and not is_adapters(name):
                state[f"{number}.{name}" if len(model) > 1 else name] = value
    return state


def model_shards(model: list[Any], *, adapters_only: bool) -> list[Shard]:
    """This rank's weights, but for quantised ones."""
    return [shard for weight in _weights(model, adapters_only=adapters_only) for shard in weight.shards()]


def quantized_weights(model: list[Any]) -> "Iterator[QuantizedWeight]":
    """This rank's weights that are quantised when they are read, in the same order on all ranks that share them.

    Args:
        model: This rank's chunks, without DDP.
    """
    for value in model_state(model, adapters_only=False).values():
        layer = getattr(value.data, "quantized_layer", None) if _holds_tensor(value) else None
        if layer is not None:
            yield QuantizedWeight(layer, value)


def optimizer_shards(optimizer: Any, model: list[Any], *, adapters_only: bool) -> list[Shard]:
    """This rank's part of the optimizer's state: fp32 weights and moments, named after the weights.

    Args:
        optimizer: Megatron's optimizer over the model.
        model: This rank's chunks, without DDP.
        adapters_only: As for `model_shards`.
    """
    weights = list(_weights(model, adapters_only=adapters_only))
    found: list[Shard] = []
    for part in parts_of(optimizer):
        for weight in weights:
            state, start = _state_of(part, weight.parameter)
            for name, held in state.items():
                stand_in = held if isinstance(held, Remainder) else None
                flat = held.tensor if isinstance(held, Remainder) else held
                for piece in weight.pieces:
                    found += _cut(piece, weight.memory, name, flat, start, stand_in)
    return found


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers Megatron chained, with and without experts' parameters, but for one with nothing to train."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


@dataclass(frozen=True)
class _Weight:
    """A parameter of this rank, and the pieces a checkpoint stores it as (a gated layer's two halves are two)."""

    parameter: Tensor
    memory: Tensor  # what the pieces are views of: the parameter, or its stand-in's tensor
    stand_in: StandIn | None
    pieces: list[ShardedTensor]

    def shards(self) -> list[Shard]:
        """The pieces."""
        return [
            Shard(
                key=piece.key,
                tensor=_data(piece),
                offsets=tuple(piece.global_offset),
                sizes=(1,) * piece.prepend_axis_num + tuple(piece.local_shape),
                whole=tuple(piece.global_shape),
                padded=piece.allow_shape_mismatch,
                stand_in=self.stand_in,
            )
            for piece in self.pieces
        ]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that is never there in 16 bits but while it is quantised.

    Attributes:
        layer: What holds it (`peft/quantized/layers.py`).
    """

    layer: Any
    _value: Any

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        return self._value.key

    def allocated(self, dtype: torch.dtype) -> tuple[Tensor, list[Shard]]:
        """Memory on the CPU for the weight [rows, columns], and the pieces of a checkpoint to read into it."""
        memory = torch.empty(self._value.data.shape, dtype=dtype)
        return memory, self._cut(memory)

    def pieces(self) -> list[Shard]:
        """Those pieces, without memory."""
        return self._cut(self._value.data)

    def _cut(self, memory: Tensor) -> list[Shard]:
        value = copy.copy(self._value)
        value.data = memory
        return _Weight(memory, memory, None, _pieces(value)).shards()


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, ShardedTensorFactory | ShardedTensor) and value.data is not None


def _weights(model: list[Any], *, adapters_only: bool) -> Iterator[_Weight]:
    for value in model_state(model, adapters_only=adapters_only).values():
        if not _holds_tensor(value) or hasattr(value.data, "quantized_layer"):
            continue
        parameter = value.data
        stand_in = StandIn.of(parameter)
        if stand_in is not None:
            value.data = stand_in.tensor
        yield _Weight(parameter, value.data, stand_in, _pieces(value))


def _pieces(value: Any) -> list[ShardedTensor]:
    built = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
    return [piece for piece in built if isinstance(piece, ShardedTensor)]


def _data(piece: ShardedTensor) -> Tensor:
    assert piece.data is not None
    return piece.data.detach()


def _state_of(part: Any, parameter: Any) -> tuple[dict[str, Tensor | Remainder], int]:
    """A parameter's tensors in one optimizer, and where in the flat parameter they start; empty where it has none."""
    if isinstance(part, DistributedOptimizer):
        if parameter not in part.model_param_group_index_map:
            return {}, 0
        tensors = _distributed_state(part, parameter)
        start = part._get_model_param_range_map(parameter)["param"].start
    else:
        main = getattr(parameter, "main_param", None)
        main = parameter if main is None else main
        if main not in part.optimizer.state:
            return {}, 0
        tensors, start = {"param": main, **part.optimizer.state[main]}, 0
    # torch's AdamW counts its steps in a tensor per parameter; the count is saved once, with the schedule.
    state = {k: v for k, v in tensors.items() if isinstance(v, Tensor | Remainder) and k != "step"}
    return {k: v if isinstance(v, Remainder) else v.detach().view(-1) for k, v in state.items()}, start


def _distributed_state(part: Any, parameter: Any) -> dict[str, Any]:
    """The fp32 weights and moments of this rank's share: the memory itself, which Megatron's own call gives copies of.

    Moments are written in the dtype they have, and read into whatever dtype they have then.
    """
    if not part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return part._get_main_param_and_optimizer_states(parameter)
    group, number = part.model_param_group_index_map[parameter]
    share = part.optimizer.param_groups[group]["params"][number]
    state = dict(part.optimizer.state[share])
    main = state.pop("master_param")
    return {"param": Remainder.of(share, main) if main.dtype == torch.int16 else main, **state}


def _cut(
    piece: ShardedTensor, memory: Tensor, name: str, flat: Tensor, start: int, stand_in: Remainder | None
) -> Iterator[Shard]:
    """The boxes of one piece that a contiguous part of its parameter's state covers."""
    data = _data(piece)
    begin = int(data.storage_offset()) - int(memory.storage_offset())
    first, last = max(start, begin), min(start + flat.numel(), begin + data.numel())
    if first >= last:
        return
    ones = (1,) * piece.prepend_axis_num
    zeros = (0,) * piece.prepend_axis_num
    for offset, sizes, position in boxes(tuple(piece.local_shape), first - begin, last - begin):
        at = begin + position - start
        yield Shard(
            key=f"optimizer.state.{name}.{piece.key}",
            tensor=flat[at : at + math.prod(sizes)],
            offsets=tuple(g + o for g, o in zip(piece.global_offset, zeros + offset, strict=True)),
            sizes=ones + sizes,
            whole=tuple(piece.global_shape),
            padded=piece.allow_shape_mismatch,
            stand_in=stand_in,
        )


def boxes(shape: Shape, first: int, last: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Cut a contiguous range of a tensor's elements into boxes.

    Args:
        shape: The tensor's.
        first: First element, counted in memory order.
        last: One after the last.

    Yields:
        (offsets, sizes, first element) of each box; at most two per axis, and one more.
    """
    if first >= last:
        return
    if len(shape) <= 1:
        yield (first,) * len(shape), (last - first,) * len(shape), first
        return
    row = math.prod(shape[1:])
    start, end = -(-first // row), last // row  # whole rows
    if start > end:  # inside one row
        yield from _within_row(shape, end, first, last)
        return
    if first < start * row:
        yield from _within_row(shape, start - 1, first, start * row)
    if start < end:
        yield (start,) + (0,) * (len(shape) - 1), (end - start, *shape[1:]), start * row
    if end * row < last:
        yield from _within_row(shape, end, end * row, last)


def _within_row(shape: Shape, row: int, first: int, last: int) -> Iterator[tuple[Shape, Shape, int]]:
    begin = row * math.prod(shape[1:])
    for offsets, sizes, position in boxes(shape[1:], first - begin, last - begin):
        yield (row, *offsets), (1, *sizes), begin + position


def write_shares(places: list[list[tuple[Any, int]]]) -> list[set[Any]]:
    """Who writes what: every piece once, spread evenly over the ranks that hold a copy of it.

    Args:
        places: Per rank, (place, bytes) of each shard it holds.

    Returns:
        Per rank, the places it writes.
    """
    holders: dict[Any, tuple[int, list[int]]] = {}
    for rank, held in enumerate(places):
        for place, nbytes in held:
            holders.setdefault(place, (nbytes, []))[1].append(rank)
    loads = [0] * len(places)
    shares: list[set[Any]] = [set() for _ in places]
    # What only one rank has comes first, then the large before the small.
    for place, (nbytes, ranks) in sorted(holders.items(), key=lambda h: (len(h[1][1]) > 1, -h[1][0], h[0])):
        writer = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[writer] += nbytes
        shares[writer].add(place)
    return shares
