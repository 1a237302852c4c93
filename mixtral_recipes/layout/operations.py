"""Floating-point operations that a model needs, in the convention papers use. Pure Python."""

from mixtral_recipes.layout.shapes import ModelShape


def flops_per_token(shape: ModelShape, sequence_length: float, *, topk: int = 2, adapters_only: bool = False) -> float:
    """Operations one token costs in a training step.

    A multiplication and an addition count as two; attention is causal, so a token meets half of its sequence. The
    backward pass costs twice the forward pass, or once where weights are frozen (only activations' gradients).
    Recomputation and adapters are not counted.

    Args:
        shape: The model.
        sequence_length: Mean tokens per sequence.
        topk: Experts per token.
        adapters_only: Whether the weights are frozen.
    """
    h = shape.hidden_size
    queries = shape.head_dim * shape.num_attention_heads
    keys = shape.head_dim * shape.num_query_groups
    projections = 2 * h * (queries + 2 * keys) + 2 * queries * h
    attention = 2 * 2 * queries * sequence_length / 2
    experts = topk * 3 * 2 * h * shape.ffn_hidden_size + 2 * h * shape.num_moe_experts
    forward = shape.num_layers * (projections + attention + experts) + 2 * h * shape.vocab_size
    return forward * (2 if adapters_only else 3)
