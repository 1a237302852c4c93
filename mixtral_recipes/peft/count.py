"""How many parameters a scheme trains, by kind of module: arithmetic on the model's sizes, over all ranks."""

from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.settings.peft import ALL_LINEAR, DoRA, LoRA


def trained_parameters(scheme: LoRA, shape: ModelShape) -> dict[str, int]:
    """Megatron's name of each kind of module -> what is trained of it, in a model of these sizes."""
    h, q, f = shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.ffn_hidden_size
    kv = shape.num_query_groups * shape.head_dim
    # [out, in] of each kind's matrix.
    sizes = {"linear_qkv": (q + 2 * kv, h), "linear_proj": (h, q), "linear_fc1": (2 * f, h), "linear_fc2": (h, f)}
    found: dict[str, int] = {}
    for kind in ALL_LINEAR:
        rows, columns = sizes[kind]
        each = scheme.dim_of(kind) * (rows + columns) + (rows if isinstance(scheme, DoRA) else 0)
        count = sum(scheme.adapts(name) for name in _layers_of(kind, shape))
        if count:
            found[kind] = count * each
    return found | dict.fromkeys(scheme.modules_to_save, shape.vocab_size * h)


def told(trained: dict[str, int]) -> str:
    """Counts in words, the sum first."""
    parts = ", ".join(f"{kind} {short(count)}" for kind, count in trained.items())
    return f"{short(sum(trained.values()))} parameters ({parts})"


def short(count: int) -> str:
    """A number of parameters, three digits of it."""
    for unit, word in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{word}"
    return str(count)


def _layers_of(kind: str, shape: ModelShape) -> list[str]:
    """The names of a kind's layers, layers and experts counted over all ranks."""
    layers = range(shape.num_layers)
    if kind in ("linear_qkv", "linear_proj"):
        return [f"decoder.layers.{layer}.self_attention.{kind}" for layer in layers]
    return [f"decoder.layers.{layer}.mlp.experts.{e}.{kind}" for layer in layers for e in range(shape.num_moe_experts)]
