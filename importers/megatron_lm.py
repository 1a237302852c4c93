"""A Megatron-LM checkpoint opened for import: what its training script saves as torch_dist, seen as canonical tensors.

The script's arguments, which say what model it is, are in a pickle, read as data: no class in it is looked up. The
tokenizer is not saved; it has to be beside the weights.
"""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.archive import read_settings
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.data.tokenizers import TOKENIZER_FILES, load_tokenizer
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import Source
from mixtral_recipes.importers.model_weights import ModelWeights, canonical_rows, embedding_in

_TRACKER = "latest_checkpointed_iteration.txt"
_COMMON = "common_state/shard_0_1"  # an object among the weights; up to Megatron-Core 0.18, a file
_COMMON_FILE = "common.pt"
# Arguments that have another name than the TransformerConfig field they set, newer releases' names first.
_ARGUMENTS = {
    "num_moe_experts": ("num_experts",),
    "layernorm_epsilon": ("layernorm_epsilon", "norm_epsilon"),
    "layernorm_zero_centered_gamma": ("layernorm_zero_centered_gamma", "apply_layernorm_1p"),
    "seq_len_interpolation_factor": ("rotary_seq_len_interpolation_factor",),
}
# Arguments that are no fields and change what the model computes, and whether a Mixtral has them.
_SWITCHES = {
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    **dict.fromkeys(("use_rope_scaling", "squared_relu", "quick_geglu", "spec", "use_legacy_models"), False),
}


def open_megatron_lm(folder: Path) -> Source:
    """Open a training run's folder (its newest checkpoint is taken), or that of one iteration.

    Raises:
        CheckpointError: a file, tensor or argument is missing, unexpected or wrong; the message names it.
    """
    weights = _iteration(folder)
    stored = StoredWeights(weights)
    arguments = read_arguments(stored)
    prefix, rows, dtype = embedding_in(stored)
    where = f"{weights}: args."
    beside = next((place for place in (weights, weights.parent) if _has_tokenizer(place)), None)
    if beside is None:
        named = arguments.get("tokenizer_model")
        raise CheckpointError(
            f"{weights} has no tokenizer, which Megatron-LM does not save; copy the one it was trained with "
            f"({'args.tokenizer_model' if named is None else named}) into {weights.parent}."
        )
    config = hf_config.of_a_mixtral(
        _fields(arguments, where), where, vocab_size=_vocab_size(arguments, beside, rows), dtype=dtype
    )
    dims = hf_config.dims(config)
    files = sorted(weights / name for name in (".metadata", _COMMON_FILE) if (weights / name).is_file())
    files += sorted(weights.glob("*.distcp"))
    tensors = canonical_rows(ModelWeights(stored, dims, prefix), dims)
    return Source(weights, config, dims, "megatron-lm", tensors, files, beside)


def read_arguments(stored: StoredWeights) -> dict[str, Any]:
    """The arguments of the training script, by name, from the folder of one iteration.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    file = stored.folder / _COMMON_FILE
    saved: Any = None
    if file.is_file():
        try:
            with file.open("rb") as opened:
                saved = read_settings(opened, 0, file.stat().st_size)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: cannot be read ({error}).") from error
    elif _COMMON in stored:
        saved = stored.read_settings(_COMMON)
        saved = saved[0] if isinstance(saved, list) and saved else None
    arguments = saved.get("args") if isinstance(saved, dict) else None
    if not isinstance(arguments, Namespace):
        raise CheckpointError(
            f"{stored.folder} holds no arguments of Megatron-LM's training script, and nothing else in it says which "
            "model the weights belong to; of a NeMo checkpoint, pass the folder that has weights/ and context/."
        )
    return vars(arguments)


def _iteration(folder: Path) -> Path:
    """The folder of one iteration's weights."""
    if (folder / ".metadata").is_file():
        return folder
    tracker = folder / _TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"{folder} has no {_TRACKER}, which names its newest checkpoint; pass the folder of one: "
            f"{', '.join(sorted(path.parent.name for path in folder.glob('*/.metadata')))}."
        )
    newest = tracker.read_text(encoding="utf-8", errors="replace")[:80].strip()
    if newest != "release" and not (newest.isascii() and newest.isdigit()):
        raise CheckpointError(f"{tracker} has {newest!r}; it must have an iteration's number, or 'release'.")
    weights = folder / (newest if newest == "release" else f"iter_{int(newest):07d}")
    if not (weights / ".metadata").is_file():
        raise CheckpointError(
            f"{tracker} names {weights.name}, but {weights} is no finished checkpoint in the torch_dist format; copy "
            "all of it, or pass the folder of another iteration."
        )
    return weights


def _fields(arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments as fields of a TransformerConfig."""
    for name, value in _SWITCHES.items():
        if bool(arguments.get(name, value)) is not value:
            raise CheckpointError(f"{where}{name}={arguments[name]!r} is not what a Mixtral has; it must be {value!r}.")
    fields = dict(arguments)
    for field, names in _ARGUMENTS.items():
        fields.pop(field, None)
        for name in reversed(names):
            if name in arguments:
                fields[field] = arguments[name]
    fields.pop("activation_func", None)  # silu, with swiglu
    if not arguments.get("group_query_attention", False):
        fields["num_query_groups"] = None
    if isinstance(fields.get("moe_aux_loss_coeff"), list):  # one for each kind of balancing
        fields["moe_aux_loss_coeff"] = next(iter(fields["moe_aux_loss_coeff"]), 0.0)
    return fields


def _has_tokenizer(folder: Path) -> bool:
    return any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))


def _vocab_size(arguments: dict[str, Any], beside: Path, rows: int) -> int:
    """Tokens of the tokenizer, which Megatron-LM pads to a multiple."""
    tokens = len(load_tokenizer(beside, error=CheckpointError))
    factors: list[Any] = [
        arguments.get(name) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
    ]
    if not all(type(factor) is int and factor > 0 for factor in factors):
        raise CheckpointError(
            f"{beside}: how far the vocabulary is padded is not known: args.make_vocab_size_divisible_by and "
            f"args.tensor_model_parallel_size are {factors[0]!r} and {factors[1]!r}."
        )
    multiple = math.prod(factors)
    padded = -(-tokens // multiple) * multiple
    if padded != rows:
        raise CheckpointError(
            f"{beside}: the tokenizer has {tokens} tokens, which are padded to {padded}, but the embedding has {rows} "
            "rows; weights and tokenizer belong to different models."
        )
    return tokens
