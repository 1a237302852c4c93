"""Attention over keys and values kept from before, each row of a batch at a position of its own.

Megatron's static context keeps all rows at one position and rotates every key again at each step; its dynamic one needs
CUDA. Here keys are rotated once, and a row that ends leaves its place to another.

Shape letters: s tokens of a step, b rows, g KV groups, m query heads per group, d head dimension. A group's heads lie
together, as Megatron's weights have them: m queries, a key, a value.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from megatron.core.transformer import attention as megatron
from torch import Tensor

from mixtral_recipes.models.attention import causal_attention, kernels_for_any_length


class KeyValueCache(BaseInferenceContext):
    """Keys and values of rows; what Megatron hands through its layers as ``inference_context``.

    Rows are numbered from 0. `begin_prompts` or `begin_tokens` says what the next forward pass holds.

    Attributes:
        max_sequence_length: The most tokens of a row.
    """

    def __init__(self, rows: int, length: int) -> None:
        super().__init__(InferenceConfig())
        self.max_sequence_length = length
        self._rows = rows
        self._layers: dict[int, Tensor] = {}  # of each layer, [rows, g, length, 2, d]
        self._waves: tuple[Tensor, Tensor] | None = None  # of all positions, each [length, m + 2, d]
        self._turns: tuple[Tensor, Tensor] | None = None  # of this step's tokens
        self._first = 0
        self._positions: Tensor | None = None
        self._longest = 0
        self._seen: Tensor | None = None

    def is_static_batching(self) -> bool:
        """Whether the batch is Megatron's static one; it is no dynamic one."""
        return True

    def is_decode_only(self) -> bool:
        """Whether this step holds one token of each row."""
        return self._positions is not None

    def begin_prompts(self, first: int) -> None:
        """The next pass holds prompts from their beginning, of the rows from ``first`` on.

        Shorter ones are padded behind: what the padding leaves in the cache is overwritten before it is seen.
        """
        self._first, self._positions, self._turns = first, None, None

    def begin_tokens(self, positions: list[int], device: torch.device) -> None:
        """The next pass holds one token of each of the first rows, at these positions."""
        at = torch.tensor(positions, device=device)
        self._positions, self._turns, self._seen = at, None, None
        self._longest = max(positions) + 1
        if min(positions) + 1 < self._longest:
            places = torch.arange(self._longest, device=device)
            self._seen = (places <= at[:, None])[:, None, None]  # [b, 1, 1, longest]

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Let a row take another's place."""
        for kept in self._layers.values():
            kept[target] = kept[source]

    @torch.inference_mode()
    def clear(self, row: int) -> None:
        """Forget a row that holds what is no number: the next one's mask would let it through, since 0 x NaN is NaN."""
        for kept in self._layers.values():
            kept[row] = 0

    def attend(self, layer: int, heads: Tensor, angles: Tensor) -> Tensor:
        """Keep a layer's new keys and values, and attend over all of each row.

        Args:
            layer: The layer's number.
            heads: [s, b, g, m + 2, d].
            angles: Of the rotary embedding, [max_sequence_length, 1, 1, d].

        Returns:
            [s, b, g * m * d].
        """
        s, b, g, _, d = heads.shape
        turned = self._rotated(heads, angles)
        if layer not in self._layers:
            self._layers[layer] = heads.new_zeros(self._rows, g, self.max_sequence_length, 2, d)  # finite: see `clear`
        kept = self._layers[layer]
        query, both = turned[..., :-2, :], turned[..., -2:, :]
        if self._positions is None:
            kept[self._first : self._first + b, :, :s] = both.permute(1, 2, 0, 3, 4)
            with kernels_for_any_length(query):
                return causal_attention(query.flatten(2, 3), both[..., 0, :], both[..., 1, :], d**-0.5).flatten(2)
        kept[torch.arange(b, device=heads.device), :, self._positions] = both[0]
        keys, values = kept[:b, :, : self._longest].unbind(3)
        # A group's heads are queries of one sequence: so its keys need not be repeated.
        with kernels_for_any_length(query):
            out = F.scaled_dot_product_attention(query[0], keys, values, attn_mask=self._seen)
        return out.reshape(1, b, -1)

    def _rotated(self, heads: Tensor, angles: Tensor) -> Tensor:
        """Queries and keys turned by their positions: (x, y) -> (x cos - y sin, y cos + x sin) on the halves of d.

        Values are turned by nothing, which costs less than to take them out and to put them back.
        """
        if self._waves is None:
            cos, sin = (
                wave[:, 0].to(heads.dtype).repeat(1, heads.shape[3], 1) for wave in (angles.cos(), angles.sin())
            )
            cos[:, -1], sin[:, -1] = 1, 0
            self._waves = cos, sin[..., : sin.shape[-1] // 2]
        if self._turns is None:
            at = slice(heads.shape[0]) if self._positions is None else self._positions
            axis = 1 if self._positions is None else 0
            cos, sin = (wave[at].unsqueeze(axis).unsqueeze(2) for wave in self._waves)  # [s or 1, b or 1, 1, m + 2, .]
            self._turns = cos, sin
        cos, sin = self._turns
        turned = heads * cos
        (x, y), (first, second) = heads.chunk(2, -1), turned.chunk(2, -1)
        first.addcmul_(y, sin, value=-1)
        second.addcmul_(x, sin)
        return turned


class SelfAttention(megatron.SelfAttention):
    """Megatron's self-attention; with a `KeyValueCache` it attends over what the cache keeps."""

    def forward(self, hidden_states: Tensor, *args: Any, inference_context: Any = None, **named: Any) -> Any:
        """As Megatron's."""
        if not isinstance(inference_context, KeyValueCache):
            return super().forward(hidden_states, *args, inference_context=inference_context, **named)
        out = inference_context.attend(self.layer_number, self._heads(hidden_states), named["rotary_pos_emb"])
        return self.linear_proj(out)

    def _heads(self, hidden_states: Tensor) -> Tensor:
        """Queries, keys and values by group, [s, b, g, m + 2, d]."""
        if self.num_query_groups_per_partition * self.world_size > (self.config.num_query_groups or 0):
            # several tensor-parallel ranks share a group
            parts: Any = self.get_query_key_value_tensors(hidden_states)
            return torch.cat(parts, dim=2).unsqueeze(2)
        mixed, _ = self.linear_qkv(hidden_states)
        shape = (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        return mixed.view(*mixed.shape[:2], *shape)
