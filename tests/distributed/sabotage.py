"""Reductions to leave out, one at a time, so that the comparisons of layouts are seen to notice.

Patches are never taken back: they are made in a rank's own process, which ends after its run.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

from mixtral_recipes.models import attention
from mixtral_recipes.training import optimizer as built


def leave_out(reduction: str) -> None:
    """Leave one reduction out in this process."""
    _REDUCTIONS[reduction]()


def _data_parallel_gradients() -> None:
    DistributedDataParallel.finish_grad_sync = lambda self, *args, **kwargs: None  # pyright: ignore


def _sequence_parallel_gradients() -> None:
    _module(finalize_model_grads)["_allreduce_non_tensor_model_parallel_grads"] = lambda *args, **kwargs: None


def _gradient_norm() -> None:
    def local(grads_for_norm: Any, norm_type: float = 2, grad_stats_parallel_group: Any = None) -> float:
        grads = [grads_for_norm] if isinstance(grads_for_norm, Tensor) else grads_for_norm
        return float(torch.stack([grad.norm() for grad in grads]).norm()) if grads else 0.0

    vars(megatron_optimizer)["get_grad_norm_fp32"] = local


def _token_count() -> None:
    whole = finalize_model_grads

    def only_here(ddp: list[Any], num_tokens: Tensor | None = None, **named: Any) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        whole(ddp, None, **named)
        if num_tokens is not None and stage:
            for chunk in ddp:
                chunk.scale_gradients(1 / num_tokens)

    vars(built)["finalize_model_grads"] = only_here


def _key_value_gradients() -> None:
    def own_part_only(tensor: Tensor, group: Any) -> Tensor:
        return gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=False, group=group)

    vars(attention)["gather_from_sequence_parallel_region"] = own_part_only


def _expert_outputs() -> None:
    def own_part_only(tensor: Tensor, group: Any, input_split_sizes: Any = None) -> Tensor:
        sizes = input_split_sizes or tensor.shape[0] // group.size()
        return tensor.split(sizes)[group.rank()]

    vars(token_dispatcher)["reduce_scatter_to_sequence_parallel_region"] = own_part_only


def _expert_adapter_gradients() -> None:
    vars(built)["reduce_expert_adapter_gradients"] = lambda ddp: None


def _module(function: Callable[..., Any]) -> dict[str, Any]:
    return function.__globals__


_REDUCTIONS = {
    "data_parallel_gradients": _data_parallel_gradients,
    "sequence_parallel_gradients": _sequence_parallel_gradients,
    "gradient_norm": _gradient_norm,
    "token_count": _token_count,
    "key_value_gradients": _key_value_gradients,
    "expert_outputs": _expert_outputs,
    "expert_adapter_gradients": _expert_adapter_gradients,
}
