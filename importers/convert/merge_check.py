"""Whether a merged model computes what its base and its adapter compute apart: logits, layer by layer.

No model is built and nothing is merged: a matrix is read a few rows at a time, used for both models and dropped, so
memory does not grow with the model. Base and merged model are read once each.

Shape letters: t tokens of all sequences, h hidden size, v vocabulary. Activations stand in a stack of three: the base
alone, the base with its adapter beside it, the merged model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.reading import close_inputs
from mixtral_recipes.checkpoints.format.rows import Rows, pieces, read_tensor
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.quantized_base import as_trained_over
from mixtral_recipes.importers.convert.stored_adapters import LowRank, StoredAdapters
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.mapping import canonical_sources
from mixtral_recipes.importers.model_weights import ModelWeights, canonical_rows
from mixtral_recipes.importers.open import open_model
from mixtral_recipes.peft.lengths import lengths_of, stretch
from mixtral_recipes.system.progress import progress_bar

SEQUENCES, TOKENS = 3, 16
# Of the logits' size: fp32 sums in another order; else one rounding of each merged weight, carried through the layers
# (bf16 keeps 8 bits, fp16 11).
TOLERANCE = {"F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}
_NOTHING = 1e-4  # an adapter that does less is as good as untrained
_BASE, _APART, _MERGED = range(3)
_PIECE_BYTES = 1 << 20  # of a matrix as it is stored: a larger piece leaves the cache, and takes twice the time


@dataclass(frozen=True)
class MergeCheck:
    """How far a merged model is from its base with the adapter beside it.

    Attributes:
        difference: Root mean square of the logits' differences, over that of the logits.
        effect: The same between the base and the base with its adapter: what the adapter does.
        dtype: Of the merged weights, as safetensors spells it.
    """

    difference: float
    effect: float
    dtype: str

    @property
    def words(self) -> str:
        """For people."""
        lost = "; rounding loses much of that change, and --dtype fp32 would keep it" if self.blurred else ""
        return (
            f"logits of the merged model differ from those of base plus unmerged adapter by {self.difference:.1e} of "
            f"their size (weights in {self.dtype}); the adapter changes them by {self.effect:.1e}{lost}"
        )

    @property
    def blurred(self) -> bool:
        """Whether rounding is not small beside what the adapter does."""
        return self.effect > _NOTHING and self.dtype != "F32" and self.difference > 0.5 * self.effect

    def record(self) -> dict[str, Any]:
        """As lineage.json and ``--json`` have it."""
        return {"logits_difference": self.difference, "adapter_effect": self.effect, "dtype": self.dtype}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "MergeCheck":
        """The inverse of `record`."""
        return cls(record["logits_difference"], record["adapter_effect"], record["dtype"])


def check_merge(
    checkpoint: Path, base: Path, merged: Path, *, into: str | None = None, progress: bool = True
) -> MergeCheck:
    """Compare a merged model with the base and the adapter it was made of, in fp32 on the same tokens.

    Both are sent to the experts that base and adapter choose, since a choice so close that rounding turns it is no
    mistake.

    Args:
        checkpoint: The adapter checkpoint.
        base: The checkpoint it adapts.
        merged: The model folder, finished but for its name.
        into: What the adapter was merged into, as `quantized_base.merged_into` says.
        progress: Show a progress bar on a terminal.

    Raises:
        CheckpointError: they differ by more than rounding, or the merged model is the base.
    """
    opened = open_model(merged)
    shown = sum(rows.rows * rows.row_bytes for rows in opened.tensors.values())
    try:
        with progress_bar("Checking", shown, shown=progress) as on_bytes:
            models = _Models(checkpoint, base, into, opened.config, opened.tensors, on_bytes)
            shape, generator = (SEQUENCES, TOKENS), torch.Generator().manual_seed(0)
            logits = models.logits(torch.randint(opened.dims.vocab_size, shape, generator=generator))
    finally:
        close_inputs()
    size = _size(logits[_APART]) or 1.0  # an output layer of zeros computes nothing else
    found = MergeCheck(
        _size(logits[_MERGED] - logits[_APART]) / size,
        _size(logits[_BASE] - logits[_APART]) / size,
        opened.tensors["model.layers.0.self_attn.q_proj.weight"].dtype,
    )
    what = f"{checkpoint}: the merged model is wrong"
    fix = "nothing was written; pass --no-check to write it anyway"
    if not found.difference <= TOLERANCE[found.dtype]:
        raise CheckpointError(f"{what}: {found.words}; rounding explains at most {TOLERANCE[found.dtype]:g}; {fix}.")
    if found.effect > _NOTHING and _size(logits[_MERGED] - logits[_BASE]) / size < 0.01 * found.effect:
        raise CheckpointError(f"{what}: it computes the same as the base without the adapter; {fix}.")
    return found


class _Models:
    """Three models that run together."""

    def __init__(
        self,
        checkpoint: Path,
        base: Path,
        into: str | None,
        config: dict[str, Any],
        merged: Mapping[str, Rows],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._config = hf_config.to_megatron(config)
        dims = hf_config.dims(config)
        self._adapters = StoredAdapters(checkpoint)
        self._sources = canonical_sources(dims)
        saved = ModelWeights(StoredWeights(base / "weights"), dims)
        self._base = canonical_rows(saved, dims, as_trained_over(checkpoint, into))
        self._merged = merged
        self._on_bytes = on_bytes

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of sequences [n, length]: [3, t, v], fp32."""
        layers, layer = self._config["num_layers"], "model.layers.{}."
        x = self._embedded(tokens)
        for number in range(layers):
            at = layer.format(number)
            x = x + self._attention(f"{at}self_attn.", self._norm(f"{at}input_layernorm.weight", x), tokens.shape)
            x = x + self._experts(f"{at}block_sparse_moe.", self._norm(f"{at}post_attention_layernorm.weight", x))
        return self._linear("lm_head.weight", self._norm("model.norm.weight", x))

    def _embedded(self, tokens: Tensor) -> Tensor:
        name = "model.embed_tokens.weight"
        sources = (self._base[name], self._whole(name) or self._base[name], self._merged[name])
        return torch.stack(
            [torch.cat([read_tensor(rows, int(t), 1, "F32") for t in tokens.flatten()]) for rows in sources]
        )

    def _whole(self, name: str) -> Rows | None:
        """What was trained in the place of a weight."""
        return self._adapters.whole(self._sources[name][0].disk)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        sources = (self._base[name], self._merged[name])
        scales = [read_tensor(rows, 0, rows.rows, "F32").flatten() for rows in sources]
        weight = torch.stack([scales[0], scales[0], scales[1]]).unsqueeze(1)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config["layernorm_epsilon"]) * weight

    def _attention(self, at: str, x: Tensor, shape: torch.Size) -> Tensor:
        def heads(name: str) -> Tensor:
            # [3 n, heads, length, head dim]
            return self._linear(f"{at}{name}.weight", x).view(3 * shape[0], shape[1], -1, size).transpose(1, 2)

        size = self._config["kv_channels"]
        cos, sin = _angles(shape[1], size, self._config["rotary_base"])
        q, k = (_rotated(heads(name), cos, sin) for name in ("q_proj", "k_proj"))
        mixed = F.scaled_dot_product_attention(q, k, heads("v_proj"), is_causal=True, enable_gqa=True)
        return self._linear(f"{at}o_proj.weight", mixed.transpose(1, 2).reshape(3, shape.numel(), -1))

    def _experts(self, at: str, x: Tensor) -> Tensor:
        scores = self._linear(f"{at}gate.weight", x)
        chosen = scores[_APART].topk(self._config["moe_router_topk"]).indices  # [t, k], for all three
        shares = scores.gather(2, chosen.expand(3, -1, -1)).softmax(-1)
        out = torch.zeros_like(x)
        for expert in range(self._config["num_moe_experts"]):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            name = f"{at}experts.{expert}."
            mine = x[:, tokens]
            hidden = F.silu(self._linear(f"{name}w1.weight", mine)) * self._linear(f"{name}w3.weight", mine)
            out[:, tokens] += self._linear(f"{name}w2.weight", hidden) * shares[:, tokens, place].unsqueeze(-1)
        return out

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """x [3, t, in] -> [3, t, out]."""
        adapter, whole = self._adapter(name), self._whole(name)
        together = _product(self._base[name], x[:_MERGED].flatten(0, 1)).view(2, x.shape[1], -1)
        apart = together[_APART] if whole is None else _product(whole, x[_APART])[:, : self._base[name].rows]
        if adapter is not None:
            apart = apart + adapter.scale * (x[_APART] @ adapter.a.t() @ adapter.b.t())
            if adapter.magnitude is not None:
                apart = apart * stretch(adapter.magnitude, _adapted_lengths(self._base[name], adapter))
        merged = _product(self._merged[name], x[_MERGED])
        self._on_bytes(self._merged[name].rows * self._merged[name].row_bytes)
        return torch.stack([together[_BASE], apart, merged])

    def _adapter(self, name: str) -> LowRank | None:
        """What adapts a projection: the rows of its layer's adapter that are the projection's."""
        weight, layer, expert, ranges = self._sources[name]
        found = self._adapters.read(weight.adapted.format(layer=layer, expert=expert)) if weight.adapted else None
        if found is None:
            return None
        b, magnitude = (
            None if part is None else torch.cat([part[start:stop] for start, stop in ranges])
            for part in (found.b, found.magnitude)
        )
        assert b is not None
        return LowRank(found.a, b, found.scale, magnitude)


def _product(rows: Rows, x: Tensor) -> Tensor:
    """x [t, in] times a stored matrix's transpose: [t, out]."""
    return torch.cat([x @ read_tensor(rows, *piece, "F32").t() for piece in pieces(rows, _PIECE_BYTES)], dim=1)


def _adapted_lengths(rows: Rows, adapter: LowRank) -> Tensor:
    """The lengths of the rows of W + s B A, [out]."""
    lengths = []
    for start, count in pieces(rows, _PIECE_BYTES):
        added = adapter.scale * (adapter.b[start : start + count] @ adapter.a)
        lengths.append(lengths_of(read_tensor(rows, start, count, "F32") + added))
    return torch.cat(lengths)


def _angles(length: int, size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position, [length, head dim], a head's halves alike."""
    speeds = base ** -(torch.arange(0, size, 2).double() / size)
    angles = torch.outer(torch.arange(length).double(), speeds).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _size(x: Tensor) -> float:
    return math.sqrt(x.double().square().mean().item())
