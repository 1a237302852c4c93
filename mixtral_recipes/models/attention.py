"""Core attention and RMSNorm in plain PyTorch, for where Transformer Engine does not run.

Shape suffixes: s sequence, b batch, n query heads, g KV groups, m heads per group (n = g * m), d head dimension,
t tokens of a packed batch (b = 1, all sequences one after the other).
"""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, built as Megatron builds norms, whose weight may live under sequence parallelism.

    With sequence parallelism each tensor-parallel rank sees a slice of the sequence, so the weight's gradient is a
    partial sum; the ``sequence_parallel`` mark makes Megatron add them up.

    Source: Megatron-Core `distributed/finalize_model_grads.py`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal grouped-query attention of one block of equally long sequences.

    KV heads are never copied: each group becomes a batch row, and its one head is expanded (stride 0) over the
    query heads that share it.

    Args:
        query: [s, b, n, d], any strides.
        key: [s, b, g, d].
        value: [s, b, g, d].
        scale: What the scores are multiplied by.

    Returns:
        [s, b, n, d], dtype of query.
    """
    s, b, n, d = query.shape
    g = key.shape[2]
    q = query.reshape(s, b * g, n // g, d).permute(1, 2, 0, 3)
    k = key.reshape(s, b * g, 1, d).permute(1, 2, 0, 3).expand(-1, n // g, -1, -1)
    v = value.reshape(s, b * g, 1, d).permute(1, 2, 0, 3).expand(-1, n // g, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(s, b, n, d)


class CoreAttention(nn.Module):
    """Causal attention on torch's SDPA, in Megatron's core-attention interface.

    Takes padded batches (queries [s, b, n, d]) and packed ones (queries [t, n, d] with ``packed_seq_params``).
    No dropout: Mixtral has none.
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
        self.scale = softmax_scale if softmax_scale is not None else (config.kv_channels or 1) ** -0.5

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
            packed_seq_params: ``cu_seqlens_q`` [sequences + 1] gives the packed sequences' borders.

        Returns:
            [s, b, n * d], or [t, n * d] when packed; dtype of query.
        """
        if packed_seq_params is None:
            return causal_attention(query, key, value, self.scale).flatten(2)
        borders = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in zip(borders, borders[1:], strict=False)]
        parts = [
            causal_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), self.scale).squeeze(1)
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
            if q.shape[0]
        ]
        return torch.cat(parts).flatten(1)
