"""Core attention and RMSNorm in plain PyTorch, used where Transformer Engine does not run.

Shape suffixes: s sequence, b batch, n query heads, g KV groups, m heads per group (n = g * m), d head dimension,
t tokens of a packed batch (b = 1, all sequences one after the other). Under context parallelism s and t count this
rank's tokens; S and T count all ranks'.
"""

import contextlib
import itertools
from typing import cast

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, built as Megatron builds norms, whose weight may live under sequence parallelism.

    With sequence parallelism each tensor-parallel rank sees a slice of the sequence, so the weight's gradient is a
    partial sum; the ``sequence_parallel`` mark makes Megatron add them up.

    Source: Megatron-Core `distributed/finalize_model_grads.py`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        # Nothing moves a frozen weight to the device later: it is not in DDP's buffers.
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


def kernels_for_any_length(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within it, torch's SDPA of tensors like ``x`` takes no longer for a length it has not seen.

    On Hopper and Blackwell torch prefers cuDNN, which plans each new length for about half a second: each token that
    generation adds.

    Source: https://github.com/modelscope/FunASR/issues/3704.
    """
    if not x.is_cuda:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal grouped-query attention of one block of equally long sequences.

    Made contiguous per head first, which makes the kernel faster, especially with many short sequences.

    Args:
        query: [s, b, n, d], any strides: the last s positions of the keys.
        key: [S, b, g, d], S >= s.
        value: [S, b, g, d].
        scale: What the scores are multiplied by.

    Returns:
        [s, b, n, d], dtype of query.
    """
    s, whole = query.shape[0], key.shape[0]
    q, k, v = (x.permute(1, 2, 0, 3).contiguous() for x in (query, key, value))  # [b, heads, s, d]
    seen = None
    if s != whole:
        seen = torch.ones(s, whole, dtype=torch.bool, device=q.device).tril(whole - s)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=query.shape[2] != key.shape[2]
    )
    return out.permute(2, 0, 1, 3)


def split_sequence_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, group: torch.distributed.ProcessGroup
) -> Tensor:
    """`causal_attention` of sequences whose tokens are spread over the context-parallel ranks.

    Every rank holds one chunk from the front of each sequence and one from the back
    (`data/batches/context_parallel.py`). Keys and values are gathered; in the backward pass their gradients are summed
    and scattered back.

    Args:
        query: [s, b, n, d]: this rank's front chunk, then its back chunk.
        key: [s, b, g, d], likewise.
        value: [s, b, g, d], likewise.
        scale: What the scores are multiplied by.
        group: The context-parallel ranks.

    Returns:
        [s, b, n, d], laid out as query.
    """
    size, rank = group.size(), group.rank()
    both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
    # [rank, front or back, chunk, ...] -> fronts in rank order, then backs in reverse rank order.
    chunks = both.unflatten(0, (size, 2, -1))
    ordered = torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)
    k, v = ordered.split(key.shape[-1], dim=-1)
    length = query.shape[0] // 2
    return torch.cat(
        [
            causal_attention(q, k[: (number + 1) * length], v[: (number + 1) * length], scale)
            for q, number in zip(query.split(length), (rank, 2 * size - 1 - rank), strict=True)
        ]
    )


class CoreAttention(nn.Module):
    """Causal attention on torch's SDPA, in Megatron's core-attention interface.

    Takes padded batches (queries [s, b, n, d]) and packed ones (queries [t, n, d] with ``packed_seq_params``), each
    also spread over context-parallel ranks. No dropout: Mixtral has none.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError("attention_dropout is not part of Mixtral and not supported by CoreAttention")
        self.deterministic = config.deterministic_mode
        self.scale = softmax_scale if softmax_scale is not None else (config.kv_channels or 1) ** -0.5
        self.group: torch.distributed.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()
            self.group = cast(torch.distributed.ProcessGroup, group)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n, d], or [t, n, d] when packed.
            key: [s, b, g, d], or [t, g, d].
            value: As key.
            attention_mask: Unused: the mask is causal, per sequence when packed.
            attn_mask_type: Unused, as above.
            attention_bias: Must be None.
            packed_seq_params: ``cu_seqlens_q`` [sequences + 1] gives the packed sequences' borders, counted over all
                context-parallel ranks.

        Returns:
            [s, b, n * d], or [t, n * d] when packed; dtype of query.
        """
        if packed_seq_params is None:
            return self._attend(query, key, value).flatten(2)
        ranks = self.group.size() if self.group is not None else 1
        borders = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [(end - start) // ranks for start, end in itertools.pairwise(borders)]
        # Of a split sequence's kernels cuDNN's alone has grouped queries with a mask.
        with kernels_for_any_length(query) if self.group is None else contextlib.nullcontext():
            parts = [
                self._attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
                for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
                if q.shape[0]
            ]
        return torch.cat(parts).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # A GPU's fused kernels add up gradients of queries in whatever order their blocks end.
        in_order = sdpa_kernel(SDPBackend.MATH) if self.deterministic and query.is_cuda else contextlib.nullcontext()
        with in_order:
            if self.group is None:
                return causal_attention(query, key, value, self.scale)
            return split_sequence_attention(query, key, value, self.scale, self.group)
