"""What a config.json says of rotary positions: their base, and scalings, which are judged by their effect."""

from typing import Any

from mixtral_recipes.errors import CheckpointError

_PLACES = ("rope_scaling", "rope_parameters")
# What 'default' does not read; other types do.
_NOT_READ = {
    "factor", "attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip


def base(config: dict[str, Any], default: float) -> float:
    """The rotary base, from whichever place transformers has kept it in; of two the one counts that it reads.

    Raises:
        CheckpointError: it is not a positive number.
    """
    read = next((field for field in _PLACES if _part(config, field)), _PLACES[0])  # the other is not looked at
    stated = {f"{read}.rope_theta": _part(config, read).get("rope_theta"), "rope_theta": config.get("rope_theta")}
    for name, value in stated.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise CheckpointError(f"config.json: {name}={value!r} must be a positive number.")
        return float(value)
    return default


def check(config: dict[str, Any], theta: float, sizes: dict[str, int]) -> None:
    """Refuse a scaling that changes what the model computes.

    Args:
        config: config.json.
        theta: The rotary base.
        sizes: hidden_size, num_attention_heads, head_dim and max_position_embeddings.

    Raises:
        CheckpointError: names the field and the scaling.
    """
    for field in _PLACES:
        rope = _part(config, field)
        if not _says_more(rope):
            continue
        kind = _kind(rope)
        unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta"} - _NOT_READ)
        if kind == "default" and unknown and rope != {**rope, "partial_rotary_factor": 1}:
            raise CheckpointError(
                f"config.json: {field}.{unknown[0]}={rope[unknown[0]]!r} is not a known field; remove it, or convert "
                "the model with another tool."
            )
        if kind != "default" and not _changes_nothing(rope, theta, sizes):
            raise CheckpointError(
                f"config.json: {field} has rope type {kind!r}, which scales positions in a way that mixtral-recipes "
                "does not support; only 'default', or a scaling that changes nothing (factor 1), can be converted."
            )


def without_scaling(config: dict[str, Any], theta: float) -> dict[str, Any]:
    """The same configuration without scalings; itself where there are none."""
    if not any(_says_more(_part(config, field)) for field in _PLACES):
        return config
    plain = {"rope_scaling": None, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    return config | {"rope_theta": theta} | {field: plain[field] for field in _PLACES if field in config}


def _part(config: dict[str, Any], field: str) -> dict[str, Any]:
    rope = config.get(field) or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: {field}={rope!r} must be an object or null.")
    return rope


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _says_more(rope: dict[str, Any]) -> bool:
    return bool(rope) and (_kind(rope) != "default" or bool(set(rope) - {"rope_type", "type", "rope_theta"}))


def _changes_nothing(rope: dict[str, Any], theta: float, sizes: dict[str, int]) -> bool:
    """Whether transformers computes the same cosines and sines as without it, for short inputs and the longest."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    last = sizes["max_position_embeddings"] - 1
    inputs = [torch.tensor([[0, last // 4]]), torch.tensor([[0, last // 2, last]])]  # some look at the longest position
    rotary = []
    try:
        for said in ({"rope_type": "default"}, rope | {"rope_type": _kind(rope)}):
            config = MixtralConfig(**sizes, rope_parameters=said | {"rope_theta": theta})  # pyright: ignore
            module = MixtralRotaryEmbedding(config)
            rotary.append([part for positions in inputs for part in module(torch.zeros(1), positions)])
    except Exception:  # whatever transformers makes of a scaling that it does not understand
        return False
    return all(map(torch.equal, *rotary))
