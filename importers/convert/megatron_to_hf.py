"""Megatron -> Hugging Face: a checkpoint folder back into safetensors that transformers loads, streamed."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES
from mixtral_recipes.checkpoints.format.stream import Part, Record, Run, Stream, lay_out, stretches
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_tensors
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.publish import publish
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.card import model_card
from mixtral_recipes.importers.convert.exported import ExportedModel, describe
from mixtral_recipes.importers.convert.hf_to_megatron import check_room, dtype_of, set_dtype
from mixtral_recipes.importers.convert.merge_check import MergeCheck
from mixtral_recipes.importers.hf import safetensors as safetensors_io
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.importers.mapping import hf_tensors
from mixtral_recipes.system.machine import io_threads
from mixtral_recipes.system.progress import progress_bar

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    layout: str = "v4",
    max_shard_size: str = "5GB",
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    threads: int | None = None,
    base: Path | None = None,
    no_check: bool = False,
    merge_into: str | None = None,
) -> Path:
    """Convert a Megatron checkpoint folder into a Hugging Face model folder.

    Vocabulary padding is dropped and optimizer state ignored. Nothing damaged is exported: an imported model's tensors
    are compared with the manifest's hashes while they are read; where they are changed on the way (adapters, dtype) or
    only files have hashes (training), the files are read through and compared first. A merged model gets its name only
    when its logits are those of base and adapter (`merge_check`).

    Args:
        checkpoint: A folder written by `import_checkpoint` or by training; adapters are merged into their base on the
            way.
        output: The model folder to make; must not exist.
        layout: "v4", what released Mixtrals hold and every loader reads; "v5", with fused experts.
        max_shard_size: Largest weight file, as "5GB" or "500MiB".
        dtype: "bf16", "fp16" or "fp32"; None keeps what the checkpoint has.
        overwrite: Replace an existing model folder.
        progress: Show a progress bar on a terminal.
        threads: How many stretches of files are written at once; None decides by the cores there are.
        base: Where the checkpoint that adapters adapt is now; None takes the place it was at. Either way it must be
            the one they were trained on.
        no_check: Leave out the comparison of a merged model's logits, which reads base and merged model once more.
        merge_into: Of an adapter trained over a quantised base: "original", the weights before they were quantised
            (default), or "4bit" ("8bit"), those it was trained over, dequantised.

    Returns:
        The model folder.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, or holds no full model; or a merged model computes
            something else than base and adapter.
        EnvironmentProblem: the disk has too little room.
    """
    shard_bytes = parse_size(max_shard_size)
    if layout not in ("v4", "v5"):
        raise CheckpointError(f"--layout {layout} is not a known layout; use v4 or v5.")
    model = ExportedModel.of(checkpoint, base, merge_into, dtype_of(dtype))
    final = Path(os.path.abspath(output))
    with publish(final, "export", overwrite=overwrite, sources=(checkpoint, model.base)) as staging:
        _Export(model, staging, layout, no_check).run(shard_bytes, threads or io_threads(), progress=progress)
    return final


def parse_size(text: str) -> int:
    """Bytes in "5GB", "500MiB" or a plain number."""
    found = re.fullmatch(r"\s*(\d{1,20}(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        raise CheckpointError(f"--max-shard-size {text!r} is not a size; write it as 5GB or 500MiB.")
    return size


@dataclass
class _Tensor:
    """A tensor of the folder being written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    record: Record


@dataclass
class _Export:
    """One conversion, from a checkpoint into a staging folder."""

    model: ExportedModel
    staging: Path
    layout: str
    no_check: bool

    def run(self, shard_bytes: int, threads: int, *, progress: bool) -> None:
        """Write weights, index, context, model card and provenance."""
        tensors = self._tensors()
        total = sum(tensor.record.nbytes for tensor in tensors)
        check_room(self.staging, total)
        runs = self._lay_out_shards(tensors, shard_bytes, threads)
        with progress_bar("Exporting", total, shown=progress) as on_bytes:
            stream = Stream(threads, on_bytes, hash_files=False)
            stream.write(runs)
        self.model.check_digests(stream.digests)
        self._write_context(tensors, stream.digests, progress=progress)

    def _tensors(self) -> list[_Tensor]:
        """Every tensor of the folder, with the rows it is made of."""
        rows = self.model.rows()
        tensors = []
        for name, stored in hf_tensors(self.model.dims, fused=self.layout == "v5").items():
            parts = [Part(part, rows[part], 0, rows[part].rows) for part in stored.names]
            dtype = self.model.dtype or parts[0].source.dtype
            nbytes = math.prod(stored.shape) * ITEM_BYTES[dtype]
            tensors.append(_Tensor(name, dtype, stored.shape, Record(parts=parts, dtype=dtype, nbytes=nbytes)))
        return tensors

    def _lay_out_shards(self, tensors: list[_Tensor], shard_bytes: int, threads: int) -> list[Run]:
        """Decide the files, write the index, and cut the files into stretches for the threads."""
        by_name = {tensor.name: tensor for tensor in tensors}
        sizes = {tensor.name: tensor.record.nbytes for tensor in tensors}
        shards = safetensors_io.split_shards(sizes, shard_bytes)
        longest = max(16 << 20, sum(sizes.values()) // (4 * threads))
        runs: list[Run] = []
        weight_map: dict[str, str] = {}
        for index, names in enumerate(shards):
            file = safetensors_io.shard_name(index, len(shards))
            header = safetensors_io.header_bytes({name: (by_name[name].dtype, by_name[name].shape) for name in names})
            records = [Record(prefix=header), *(by_name[name].record for name in names)]
            lay_out(records)
            runs += stretches(self.staging / file, records, longest)
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (self.staging / safetensors_io.INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return runs

    def _write_context(self, tensors: list[_Tensor], digests: dict[str, str], *, progress: bool) -> None:
        """config.json, tokenizer, generation config, model card, and where all of it came from."""
        context = self.model.checkpoint / "context"
        sidecars.copy(sidecars.of(context), context, self.staging)
        set_dtype(self.staging / "config.json", tensors[0].dtype)
        found = None if self.no_check else self.model.check_merge(self.staging, progress=progress)
        record = self._lineage(tensors, digests, found)
        card = model_card(record, self.model.config, self.layout, tensors[0].dtype, found)
        describe(self.staging, self.model.checkpoint, record, card)

    def _lineage(self, tensors: list[_Tensor], digests: dict[str, str], checked: MergeCheck | None) -> Lineage:
        """What was written, and what it was made from."""
        dtypes = {part.name: tensor.dtype for tensor in tensors for part in tensor.record.parts if part.name}
        hashed = self.model.tensor_entries(dtypes, digests)
        identity = Identity.of(hash_of_tensors(hashed), self.staging)
        return self.model.lineage(identity, hashed, self.layout, checked)
