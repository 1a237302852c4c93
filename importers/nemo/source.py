"""A NeMo 2.0 checkpoint opened for import: Megatron's tensors under NeMo's names, seen as canonical ones."""

from pathlib import Path

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import Source
from mixtral_recipes.importers.model_weights import ModelWeights, canonical_rows, embedding_in
from mixtral_recipes.importers.nemo.context import Context, read_context


def open_nemo(folder: Path) -> Source:
    """Open a folder with ``weights/`` and ``context/``.

    Raises:
        CheckpointError: a tensor or setting is missing, unexpected or wrong; the message names it.
    """
    context = read_context(folder)
    weights = folder / "weights"
    stored = StoredWeights(weights)
    prefix, rows, dtype = embedding_in(stored)
    config = context.hf_config(_vocab_size(context, rows), dtype)
    dims = hf_config.dims(config)
    files = sorted([weights / ".metadata", *weights.glob("*.distcp")])
    tokenizer = context.tokenizer or context.file
    beside = tokenizer if tokenizer.is_dir() else tokenizer.parent
    tensors = canonical_rows(ModelWeights(stored, dims, prefix), dims)
    return Source(folder, config, dims, "nemo", tensors, files, beside)


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
