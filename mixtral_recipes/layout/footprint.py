"""Memory per GPU of a default layout: the arithmetic by which the catalog's layouts were chosen. Pure Python.

It counts what is large and certain, for the fullest rank, and nothing else: a layout that passes here with a tenth of
the memory to spare is a candidate, not a promise. Every figure is in GB of 10^9 bytes.

    weights      2 bytes per parameter on the rank (bf16; FP8 keeps two one-byte copies)
    gradients    4 bytes per trained parameter (fp32)
    optimizer    12 bytes per trained parameter (fp32 master, two moments), shared by the copies of each parameter
    activations  per token and layer 20 h + 4 kv + 12 f bytes without recomputation (2 bytes each of: norms' inputs and
                 outputs 4 h, qkv h + 2 kv, attention's output h; for each of top-2 experts, input and output 2 h, gate
                 and up 2 f, product f), 2 h with recomputation; times the layers in flight
    logits       10 bytes per token and vocabulary entry on the last stage (bf16, and fp32 for the loss)

``scripts/print_footprints.py`` prints every layout.
"""

from dataclasses import dataclass

from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.layout.topology import Topology

_TOP_K = 2


@dataclass(frozen=True)
class Footprint:
    """GB per GPU, by kind."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All kinds together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def expert_parameters(shape: ModelShape) -> int:
    """Parameters of all experts of all layers."""
    return shape.num_layers * shape.num_moe_experts * 3 * shape.hidden_size * shape.ffn_hidden_size


def parameters(shape: ModelShape, *, vocab_size: int | None = None) -> int:
    """Parameters of the whole model.

    Args:
        shape: The model.
        vocab_size: Rows of the embedding and of the output layer; None takes the model's.
    """
    h, kv, q = shape.hidden_size, shape.num_query_groups * shape.head_dim, shape.num_attention_heads * shape.head_dim
    layer = 2 * h * q + 2 * h * kv + shape.num_moe_experts * h + 2 * h
    vocabulary = 2 * (vocab_size or shape.vocab_size) * h
    return expert_parameters(shape) + shape.num_layers * layer + vocabulary + h


def footprint(
    shape: ModelShape, topology: Topology, *, seq_length: int, recompute: bool, trains_all: bool
) -> Footprint:
    """Memory of the fullest rank.

    Args:
        shape: The model.
        topology: The layout.
        seq_length: Tokens per sequence (one sequence per microbatch).
        recompute: Whether every layer is recomputed in the backward pass.
        trains_all: Whether all weights are trained, or adapters, which are small enough not to count.
    """
    tp, pp = topology.tensor_model_parallel_size, topology.pipeline_model_parallel_size
    experts = expert_parameters(shape) / topology.expert_ranks
    dense = (parameters(shape) - expert_parameters(shape)) / (tp * pp)
    trained = experts + dense if trains_all else 0.0
    copies = topology.data_parallel_size * topology.context_parallel_size
    states = dense / copies + experts / topology.expert_data_parallel_size if trains_all else 0.0
    return Footprint(
        weights=2 * (experts + dense) / 1e9,
        gradients=4 * trained / 1e9,
        optimizer=12 * states / 1e9,
        activations=_activations(shape, topology, seq_length, recompute) / 1e9,
    )


def _activations(shape: ModelShape, topology: Topology, seq_length: int, recompute: bool) -> float:
    tp, pp = topology.tensor_model_parallel_size, topology.pipeline_model_parallel_size
    tokens = seq_length / (topology.context_parallel_size * tp)
    h, f = shape.hidden_size, shape.ffn_hidden_size
    kv = shape.num_query_groups * shape.head_dim
    layer = (4 + _TOP_K * 2 + 2) * 2 * h + 4 * kv + _TOP_K * 6 * f
    # 1F1B keeps PP microbatches of L / PP layers on the first stage; interleaving adds (PP - 1) chunks (Megatron).
    in_flight = shape.num_layers * (1 + (pp - 1) / (pp * (topology.virtual_pipeline_model_parallel_size or 1)))
    in_flight = in_flight if topology.virtual_pipeline_model_parallel_size else shape.num_layers
    logits = tokens * 10 * shape.vocab_size if pp == 1 else 0.0
    stored = tokens * in_flight * (2 * h if recompute else layer)
    return stored + (tokens * layer if recompute else 0.0) + logits
