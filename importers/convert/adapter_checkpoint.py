"""Write the adapters of another form as an adapter checkpoint of ours."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mixtral_recipes.checkpoints.format.manifest import file_entries, write_manifest
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.format.writer import write_file, write_metadata
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_config, hash_of_files, hash_of_tokenizer
from mixtral_recipes.checkpoints.lineage.record import Lineage, Parent
from mixtral_recipes.checkpoints.publish import publish
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.settings.peft import LoRA, recorded
from mixtral_recipes.system.files import write_json
from mixtral_recipes.system.locks import held


def write_adapter_checkpoint(
    output: Path,
    scheme: LoRA,
    tensors: Mapping[str, Tensor],
    *,
    base: Path,
    source: Path,
    layout: str,
    weights: str | None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter checkpoint.

    Args:
        output: The checkpoint to make; must not exist.
        scheme: What was trained.
        tensors: Every tensor by its key (`peft.names.tensor_key`).
        base: The checkpoint of the model it adapts; its context is copied.
        source: The folder it was read from.
        layout: The form of that.
        weights: A hash of its weights, for the lineage.
        overwrite: Replace an existing checkpoint.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: ``output`` is there already.
    """
    final = Path(os.path.abspath(output))
    with held(final), publish(final, "adapter", overwrite=overwrite, sources=(base, source)) as staging:
        folder, context = staging / "weights", staging / "context"
        folder.mkdir()
        shards = [Shard(key, t, (0,) * t.dim(), tuple(t.shape), tuple(t.shape)) for key, t in tensors.items()]
        written = write_file(folder, 0, shards, {})
        write_metadata(folder, [written])
        context.mkdir()
        sidecars.copy(sidecars.of(base / "context"), base / "context", context)
        facts = {"run": source.name, "step": 0, "consumed_samples": 0, "skipped_steps": 0, "world_size": 1}
        write_json(context / "run.json", facts | {"metrics": {}, "kind": "adapter", "peft": recorded(scheme)})
        known = {f"weights/{written.name}": written.pieces}
        identity = Identity(
            hash_of_files(file_entries(staging, known)), hash_of_config(context), hash_of_tokenizer(context)
        )
        parents = (
            Parent("base", lineage.of_checkpoint(base), os.path.abspath(base)),
            Parent(
                "source",
                Lineage("source", Identity(weights), origin={"folder": source.name}),
                os.path.abspath(source),
            ),
        )
        lineage.write(staging, Lineage("adapter", identity, parents=parents))
        write_manifest(staging, "adapter", source={"path": str(source), "layout": layout}, known=known)
    return final
