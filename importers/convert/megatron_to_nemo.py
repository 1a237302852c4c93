"""Megatron -> NeMo 2.0: a checkpoint folder as NeMo's ``restore_config`` and ``llm.export_ckpt`` load it, streamed.

    FOLDER/weights/      torch_dist under NeMo's names, common.pt
    FOLDER/context/      io.json, model.yaml, nemo_tokenizer/

Source: NeMo `lightning/io/pl.py` (MegatronCheckpointIO), `lightning/io/mixin.py` (load).
"""

import os
import shutil
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES, Rows
from mixtral_recipes.checkpoints.format.stream import Stream
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_tensors, tokenizer_files
from mixtral_recipes.checkpoints.publish import publish
from mixtral_recipes.importers.convert.exported import ExportedModel
from mixtral_recipes.importers.convert.hf_to_megatron import check_room, dtype_of
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.importers.model_weights import PREFIX
from mixtral_recipes.importers.nemo import fiddle_json
from mixtral_recipes.importers.nemo.fiddle_json import CALL, TARGET
from mixtral_recipes.layout.shapes import MIXTRAL_8X22B, ModelShape
from mixtral_recipes.system.machine import io_threads
from mixtral_recipes.system.progress import progress_bar

_TOKENIZER = "nemo_tokenizer"  # NeMo's own name for the folder
_MODEL = "nemo.collections.llm.gpt.model.mixtral"
_AUTO_TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
# Megatron with Transformer Engine 1.14 or newer asks for a state of the attention itself as well.
_ATTENTION_STATE = "decoder.layers.self_attention.core_attention._extra_state"


def export_nemo(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    base: Path | None = None,
    progress: bool = True,
    threads: int | None = None,
    no_check: bool = False,
    merge_into: str | None = None,
) -> Path:
    """Convert a checkpoint folder into a NeMo 2.0 checkpoint.

    Args:
        checkpoint: A folder written by an import or by training; adapters are merged into their base on the way.
        output: The folder to make; must not exist.
        dtype: "bf16", "fp16" or "fp32"; None keeps what the checkpoint has.
        overwrite: Replace an existing export.
        base: Where an adapter checkpoint's base is now; it is compared with the one recorded.
        progress: Show a progress bar on a terminal.
        threads: Files written at once; None decides by the cores there are.
        no_check: As for `export_checkpoint`.
        merge_into: Likewise.

    Returns:
        The folder.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or holds no full model.
        EnvironmentProblem: the disk has too little room.
    """
    model = ExportedModel.of(checkpoint, base, merge_into, dtype_of(dtype))
    final = Path(os.path.abspath(output))
    with publish(final, "export", overwrite=overwrite, sources=(checkpoint, model.base)) as staging:
        rows, weights = model.rows(), staging / "weights"
        dtypes = {name: model.dtype or tensor.dtype for name, tensor in rows.items()}
        digests = _write_weights(weights, rows, model.dims, dtypes, threads or io_threads(), progress=progress)
        model.check_digests(digests)
        first = TORCH_NAMES[next(iter(dtypes.values()))]
        write_context(staging / "context", checkpoint / "context", model.config, first)
        checked = None if no_check else model.check_merge(staging, progress=progress)
        hashed = model.tensor_entries(dtypes, digests)
        identity = Identity.of(hash_of_tensors(hashed), staging)
        lineage.write(staging, model.lineage(identity, hashed, "nemo", checked))
    return final


def _write_weights(
    folder: Path, rows: dict[str, Rows], dims: ModelShape, dtypes: dict[str, str], threads: int, *, progress: bool
) -> dict[str, str]:
    """Write the torch_dist folder; returns the hash of every canonical tensor."""
    from mixtral_recipes.checkpoints.format.writer import write_items, write_metadata
    from mixtral_recipes.importers.convert.plan import object_items, stacked_dtypes, tensor_items

    items = tensor_items(dims, rows, stacked_dtypes(dims, dtypes, "the checkpoint"), PREFIX)
    total = sum(record.nbytes for _, record in items)
    check_room(folder.parent, total)
    folder.mkdir()
    with progress_bar("Exporting", total, shown=progress) as on_bytes:
        stream = Stream(threads, on_bytes, hash_files=False)
        files = write_items(folder, 0, object_items(dims, (_ATTENTION_STATE,), PREFIX) + items, stream)
    write_metadata(folder, files)
    write_common(folder)
    return stream.digests


def write_common(folder: Path) -> None:
    """``common.pt``: what Megatron of NeMo's time keeps beside the tensors; of a model as it is here, nothing."""
    import torch

    torch.save({"epoch": 0, "global_step": 0}, folder / "common.pt")


def write_context(
    folder: Path, source: Path, config: dict[str, Any], dtype: str, transform: dict[str, Any] | None = None
) -> None:
    """Write ``context/``: NeMo's settings of the model, and the tokenizer.

    Args:
        folder: To make.
        source: The ``context/`` of a checkpoint of ours.
        config: Its config.json.
        dtype: Of the weights, as torch spells it.
        transform: The adapters' scheme, for an adapter checkpoint.
    """
    import yaml

    tokenizer = tokenizer_files(source)
    for path in tokenizer:
        sidecars.refuse_foreign(source, path)
        target = folder / _TOKENIZER / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    folder.mkdir(exist_ok=True)
    model = model_settings(config, dtype, has_tokenizer=bool(tokenizer), transform=transform)
    (folder / "model.yaml").write_text(yaml.safe_dump(model))
    strategy = {
        TARGET: "nemo.lightning.pytorch.strategies.megatron_strategy.MegatronStrategy",
        "ckpt_save_optimizer": False,
        "always_save_context": True,
    }
    trainer = {
        TARGET: "nemo.lightning.pytorch.trainer.Trainer",
        "devices": 1,
        "accelerator": "cpu",
        "strategy": strategy,
    }
    root = {TARGET: "nemo.lightning.io.pl.TrainerContext", "model": model, "trainer": trainer, "extra": {}}
    (folder / "io.json").write_text(fiddle_json.dump(root))


def model_settings(
    config: dict[str, Any], dtype: str, *, has_tokenizer: bool, transform: dict[str, Any] | None = None
) -> dict[str, Any]:
    """NeMo's MixtralModel for a config.json, in the plain form of `fiddle_json`."""
    fields = hf_config.to_megatron(config)
    large = (fields["num_layers"], fields["hidden_size"]) == (MIXTRAL_8X22B.num_layers, MIXTRAL_8X22B.hidden_size)
    written = {
        name: fields[name]
        for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "num_moe_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_aux_loss_coeff", "normalization",
            "layernorm_epsilon", "init_method_std", "attention_dropout", "hidden_dropout", "gated_linear_unit",
            "add_bias_linear", "share_embeddings_and_output_weights", "max_position_embeddings", "rotary_base",
            "vocab_size",
        )
    }  # fmt: skip
    return {
        TARGET: f"{_MODEL}.MixtralModel",
        "config": {
            TARGET: f"{_MODEL}.MixtralConfig{'8x22B' if large else '8x7B'}",
            **written,
            "seq_length": fields["max_position_embeddings"],
            "position_embedding_type": "rope",
            "activation_func": {TARGET: "torch.nn.functional.silu", CALL: False},
            "make_vocab_size_divisible_by": 128,
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
            "params_dtype": {TARGET: f"torch.{dtype}", CALL: False},
        },
        **({"tokenizer": {TARGET: _AUTO_TOKENIZER, "pretrained_model_name": _TOKENIZER}} if has_tokenizer else {}),
        **({"model_transform": transform} if transform else {}),
    }
