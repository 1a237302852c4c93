"""The card that is not there, idle: results have their shapes and no values; every expert gets as many tokens."""

import sys
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Put shapes in the place of Transformer Engine's attention, which asks cuDNN for plans."""
    tex = sys.modules["transformer_engine_torch"]
    backend = tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen
    tex.get_fused_attn_backend = lambda *given, **named: (backend, "")
    tex.fused_attn_fwd, tex.fused_attn_bwd = _attention, _attention_backward
    torch.backends.cuda.enable_cudnn_sdp(False)


def _parts(given: tuple[Any, ...]) -> list[Tensor]:
    """Queries, keys and values."""
    return [each for each in given if isinstance(each, Tensor) and each.is_floating_point() and each.dim() > 2][:3]


def _attention(*given: Any, **named: Any) -> list[Tensor]:
    query = _parts(given)[0]
    statistics = query.new_empty(query.shape[-2], query.shape[0], 1, dtype=torch.float32)
    return [torch.empty_like(query), statistics, query.new_empty(2, dtype=torch.int64)]


def _attention_backward(*given: Any, **named: Any) -> list[Any]:
    return [*map(torch.empty_like, _parts(given)), None, None]


def spread_evenly() -> None:
    """Give each expert its share where Megatron reads on the host how many tokens it has."""
    dispatcher = sys.modules["megatron.core.transformer.moe.token_dispatcher"].MoEAlltoAllTokenDispatcher
    read, preprocess = dispatcher._maybe_dtoh_and_synchronize, dispatcher.preprocess

    def counted(self: Any, routing_map: Tensor) -> Any:
        self.rows_of_an_expert = routing_map.shape[0] * self.config.moe_router_topk // routing_map.shape[1]
        return preprocess(self, routing_map)

    def spread(self: Any, point: str, counts: Any) -> Any:
        found = read(self, point, counts)
        if isinstance(found, Tensor) and not found.is_cuda:
            found = torch.full_like(found, self.rows_of_an_expert)
        return found

    dispatcher.preprocess, dispatcher._maybe_dtoh_and_synchronize = counted, spread
