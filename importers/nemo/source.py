"""A NeMo 2.0 checkpoint opened for import: Megatron's tensors under NeMo's names, seen as canonical ones."""

from pathlib import Path

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES, spelled
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import Source
from mixtral_recipes.importers.mapping import WEIGHTS
from mixtral_recipes.importers.model_weights import ModelWeights, canonical_rows
from mixtral_recipes.importers.nemo.context import Context, read_context

PREFIX = "module."  # of every tensor of the model: NeMo saves a module that wraps Megatron's
_EMBEDDING = WEIGHTS[0]


def open_nemo(folder: Path) -> Source:
    """Open a folder with ``weights/`` and ``context/``.

    Raises:
        CheckpointError: a tensor or setting is missing, unexpected or wrong; the message names it.
    """
    context = read_context(folder)
    weights = folder / "weights"
    stored = StoredWeights(weights)
    prefix = prefix_of(stored)
    embedding = stored.tensors[prefix + _EMBEDDING.disk]
    stored_as = embedding.properties.dtype
    if (dtype := spelled(stored_as)) is None:
        raise CheckpointError(
            f"{weights}: weights are {stored_as}; only {', '.join(TORCH_NAMES.values())} can be read."
        )
    config = context.hf_config(_vocab_size(context, embedding.size[0]), TORCH_NAMES[dtype])
    dims = hf_config.dims(config)
    files = sorted([weights / ".metadata", *weights.glob("*.distcp")])
    tokenizer = context.tokenizer or context.file
    beside = tokenizer if tokenizer.is_dir() else tokenizer.parent
    rows = canonical_rows(ModelWeights(weights, dims, prefix), dims)
    return Source(folder, config, dims, "nemo", rows, files, beside)


def prefix_of(stored: StoredWeights) -> str:
    """What stands before the names of the model's tensors: ``module.``, once per wrapper, or nothing.

    Raises:
        CheckpointError: the model's first tensor is not there.
    """
    prefixes = [key.removesuffix(_EMBEDDING.disk) for key in stored.tensors if key.endswith(_EMBEDDING.disk)]
    found = [prefix for prefix in prefixes if not prefix.replace(PREFIX, "")]
    if not found:
        raise CheckpointError(f"{stored.folder}: {PREFIX}{_EMBEDDING.disk} is missing from the checkpoint.")
    return min(found, key=len)


def _vocab_size(context: Context, rows: int) -> int:
    """Tokens of the vocabulary: as set, else the tokenizer's; NeMo pads the embedding beyond them."""
    size = context.config[1].get("vocab_size")
    if size is None and context.tokenizer is not None:
        from mixtral_recipes.data.tokenizers import load_tokenizer

        size = len(load_tokenizer(context.tokenizer, error=CheckpointError))
    if size is None:
        return rows
    if size > rows:
        raise CheckpointError(
            f"{context.file}: the vocabulary has {size} tokens, but the embedding has only {rows} rows; weights and "
            "tokenizer belong to different models."
        )
    return size
