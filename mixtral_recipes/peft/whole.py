"""``peft.modules_to_save``: weights that are trained whole beside the adapters, and saved with them."""

from typing import Any

from mixtral_recipes.settings.peft import LoRA

# Megatron's name of a module -> its weight, in a model and in a checkpoint.
WEIGHTS = {"word_embeddings": "embedding.word_embeddings.weight", "output_layer": "output_layer.weight"}


def unfreeze(scheme: LoRA, chunk: Any) -> None:
    """Let a chunk's whole modules be trained, as far as they are on this rank."""
    wanted = {WEIGHTS[name] for name in scheme.modules_to_save}
    for name, parameter in chunk.named_parameters():
        if name in wanted:
            parameter.requires_grad_(True)


def sharded_state(chunk: Any) -> dict[str, Any]:
    """Megatron's places of a chunk's modules that are trained whole, by their keys in a checkpoint."""
    trained = {name for name, p in chunk.named_parameters() if name in WEIGHTS.values() and p.requires_grad}
    if not trained:
        return {}
    return {name: value for name, value in chunk.sharded_state_dict(prefix="").items() if name in trained}
