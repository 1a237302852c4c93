"""Megatron -> GGUF: a checkpoint folder as llama.cpp and Ollama load it, streamed, adapters merged on the way."""

import logging
import math
import os
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_recipes.checkpoints.format.rows import Rows
from mixtral_recipes.checkpoints.format.stream import Part, Record, Stream, lay_out, stretches
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_tensors
from mixtral_recipes.checkpoints.lineage.told import hub_origin
from mixtral_recipes.checkpoints.publish import publish_file
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.exported import ExportedModel
from mixtral_recipes.importers.convert.hf_to_megatron import check_room
from mixtral_recipes.importers.gguf import check as checks
from mixtral_recipes.importers.gguf import llama
from mixtral_recipes.importers.gguf.encoded import Encoded, Hashed
from mixtral_recipes.importers.gguf.extra import package
from mixtral_recipes.importers.gguf.modelfile import modelfile
from mixtral_recipes.importers.gguf.reader import HEADER, StoredFile, header_entry
from mixtral_recipes.importers.gguf.tokenizer import Vocabulary, vocabulary_of
from mixtral_recipes.importers.gguf.types import QUANTIZATIONS, Quantization, check_rows, quantization_of, tensor_type
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.mapping import StoredParts, gguf_tensors
from mixtral_recipes.importers.views import RowRanges, TurnedHeads
from mixtral_recipes.system.machine import cores, io_threads
from mixtral_recipes.system.progress import progress_bar

ENDING = ".gguf"


def export_gguf(
    checkpoint: Path,
    output: Path,
    *,
    quantization: str = "f16",
    no_check: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    threads: int | None = None,
    base: Path | None = None,
    merge_into: str | None = None,
    told: dict[str, Any] | None = None,
) -> Path:
    """Convert a Megatron checkpoint folder into a GGUF file, with a Modelfile for Ollama and its lineage beside it.

    Args:
        checkpoint: A folder written by `import_checkpoint` or by training; adapters are merged into their base on the
            way, in fp32.
        output: The file to make, which ends in ``.gguf``; must not exist.
        quantization: A name in `types.QUANTIZATIONS`. K-quants take a file in 16 bits beside the result meanwhile.
        no_check: Publish the file as it was written. Otherwise it is read back and compared with the checkpoint, tensor
            by tensor, and its next tokens with those of transformers.
        overwrite: Replace an earlier export.
        progress: Show progress bars on a terminal.
        threads: How many stretches of the file are written at once; None decides by the cores there are.
        base: Where the checkpoint that adapters adapt is now; None takes the place it was at.
        merge_into: As `export_checkpoint` takes it.
        told: Filled with what there is to say besides: ``quantization``, ``check`` (the numbers), ``commands`` (for
            Ollama) and ``notes``.

    Returns:
        The file.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, its rows or tokenizer have no form in the file, or
            what was written is not what the checkpoint says.
        EnvironmentProblem: a package is missing, or room on the disk or in memory.
    """
    final = Path(os.path.abspath(output))
    if final.suffix != ENDING:
        raise CheckpointError(f"{output}: --format gguf writes one file, whose name must end in {ENDING}.")
    kind = quantization_of(quantization)
    checks.required_packages(check=not no_check, quantization=kind)
    model = ExportedModel.of(checkpoint, base, merge_into)
    if model.base:
        model = replace(model, dtype="F32")  # each value is rounded once, to the file's type
    job = _Export(model, kind, threads or io_threads(), progress)
    if not no_check:
        checks.refuse_without_memory(model.dims)
    stem = final.name.removesuffix(ENDING)
    beside = (f"{stem}.lineage.json", f"{stem}.Modelfile")
    with publish_file(final, beside, overwrite=overwrite, sources=(checkpoint, model.base)) as staging:
        written = staging / final.name
        tensors = job.write(written)
        found = None if no_check else job.check(written)
        text, note = modelfile(final, job.vocabulary.tokenizer)
        (staging / beside[1]).write_text(text, encoding="utf-8")
        identity, files = Identity(hash_of_tensors(tensors)), (*beside, final.name)
        lineage.write(written, model.lineage(identity, tensors, f"GGUF {kind.name}", files=files))
    if told is not None:
        name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._") or "mixtral"  # what Ollama takes as a name
        create = f"ollama create {name} -f {shlex.quote(str(final.with_name(beside[1])))}"
        told |= {
            "quantization": kind.name,
            "check": found and found.as_dict(),
            "modelfile": str(final.with_name(beside[1])),
            "commands": [create, f"ollama run {name}"],
            "notes": [note] if note else [],
        }
    return final


@dataclass
class _Export:
    """One conversion, from a checkpoint into a staging folder."""

    model: ExportedModel
    kind: Quantization
    threads: int
    progress: bool
    vocabulary: Vocabulary = field(init=False)
    tensors: dict[str, StoredParts] = field(init=False)

    def __post_init__(self) -> None:
        gguf = package("gguf")
        self.tensors = gguf_tensors(self.model.dims)
        blocks = {kind.name: block for kind, (block, _) in gguf.GGML_QUANT_SIZES.items()}
        check_rows(self.tensors, self.kind, blocks)
        self.vocabulary = vocabulary_of(self.model.checkpoint / "context", self.model.dims.vocab_size)

    def write(self, path: Path) -> dict[str, dict[str, Any]]:
        """Write the file; returns what lineage records of it: name -> dtype, shape and hash."""
        self._rows = rows = self.model.rows()
        if not self.kind.by_llama_cpp:
            return self._stream(path, self.kind, rows)
        half = QUANTIZATIONS["bf16" if next(iter(rows.values())).dtype == "BF16" else "f16"]
        plain = path.with_name(f"{half.name}.gguf")
        check_room(path.parent, self._nbytes(half) + self._nbytes(self.kind))
        self._stream(plain, half, rows)
        title = f"Quantizing to {self.kind.name}"
        file_type = package("gguf").LlamaFileType[self.kind.file_type].value
        try:
            with progress_bar(title, None, shown=self.progress) as on_bytes:
                llama.quantize(plain, path, file_type, cores(), on_bytes=on_bytes)
        except CheckpointError:  # it does not say that the disk filled up
            check_room(path.parent, self._nbytes(self.kind) - (path.stat().st_size if path.exists() else 0))
            raise
        plain.unlink()
        with progress_bar("Hashing", path.stat().st_size, shown=self.progress) as on_bytes:
            return StoredFile(path).entries(hashes=True, on_bytes=on_bytes)

    def check(self, path: Path) -> checks.Measured:
        """Compare the file with the checkpoint.

        Raises:
            CheckpointError: it differs by more than its type explains.
        """
        sources = {name: self._source(parts, self._rows) for name, parts in self.tensors.items()}
        total = sum(rows.rows * rows.row_bytes for rows in sources.values())
        with progress_bar("Checking", total, shown=self.progress) as on_bytes:
            return checks.compare(
                path,
                sources,
                model=self.model,
                tokenizer=self.vocabulary.tokenizer,
                quantization=self.kind,
                on_bytes=on_bytes,
            )

    def _source(self, parts: StoredParts, rows: dict[str, Rows]) -> Rows:
        """A tensor's rows in the file's order, in the checkpoint's type."""
        if parts.order == "interleaved":
            return TurnedHeads(rows[parts.names[0]], self.model.dims.head_dim, stored="halves")
        return RowRanges([(rows[name], 0, rows[name].rows) for name in parts.names])

    def _nbytes(self, kind: Quantization) -> int:
        return sum(_nbytes(parts.shape, tensor_type(name, parts, kind)) for name, parts in self.tensors.items())

    def _stream(self, path: Path, kind: Quantization, rows: dict[str, Rows]) -> dict[str, dict[str, Any]]:
        """Write a file whose types need no llama.cpp."""
        check_room(path.parent, self._nbytes(kind))
        types = {name: tensor_type(name, parts, kind) for name, parts in self.tensors.items()}
        hashed: dict[str, Rows] = {name: Hashed(source) for name, source in rows.items()}
        header = self._header(path, kind, types)
        records = [Record(prefix=header)]
        for name, parts in self.tensors.items():
            row_bytes = _nbytes(parts.shape[-1:], types[name]) if len(parts.shape) > 1 else 4
            turned = parts.order == "interleaved"
            sources = [self._source(parts, hashed)] if turned else [hashed[part] for part in parts.names]
            encoded = [
                Encoded(part, source, types[name], row_bytes) for part, source in zip(parts.names, sources, strict=True)
            ]
            records.append(
                Record(
                    parts=[Part(name, source, 0, source.rows) for source in encoded],
                    dtype=encoded[0].dtype,
                    nbytes=_nbytes(parts.shape, types[name]),
                    align=package("gguf").GGUF_DEFAULT_ALIGNMENT,
                )
            )
        end = lay_out(records)
        # The last tensor is filled up as well: readers map whole blocks.
        records[-1].suffix = bytes(-end % package("gguf").GGUF_DEFAULT_ALIGNMENT)
        longest = max(16 << 20, end // (4 * self.threads))
        with progress_bar(f"Exporting to {kind.name}", end - len(header), shown=self.progress) as on_bytes:
            stream = Stream(self.threads, on_bytes, hash_files=False)
            stream.write(stretches(path, records, longest))
        digests = {name: source.digest.hexdigest() for name, source in hashed.items() if isinstance(source, Hashed)}
        self.model.check_digests(digests)
        padded = header + bytes(records[1].offset - len(header))
        return {HEADER: header_entry(padded)} | {
            name: {"dtype": types[name], "shape": list(parts.shape), "sha256": stream.digests[name]}
            for name, parts in self.tensors.items()
        }

    def _header(self, path: Path, kind: Quantization, types: dict[str, str]) -> bytes:
        """Everything before the first tensor, by gguf's own writer."""
        gguf = package("gguf")
        logging.getLogger("gguf").setLevel(logging.WARNING)  # what it writes, and where, is told by us
        writer = gguf.GGUFWriter(None, "llama")
        self._describe(writer, kind)
        self.vocabulary.write(writer)
        for name, parts in self.tensors.items():
            nbytes = _nbytes(parts.shape, types[name])
            kind_of = gguf.GGMLQuantizationType[types[name]]
            writer.add_tensor_info(name, parts.shape, np.dtype(np.float32), nbytes, raw_dtype=kind_of)
        beginning = path.with_name("header.gguf")
        writer.write_header_to_file(beginning)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        content = beginning.read_bytes()
        beginning.unlink()
        return content

    def _describe(self, writer: Any, kind: Quantization) -> None:
        """What llama.cpp builds the model from."""
        dims, config, gguf = self.model.dims, self.model.config, package("gguf")
        name = str(hub_origin(lineage.of_checkpoint(self.model.checkpoint)).get("id", "")).removeprefix("hf://")
        writer.add_type("model")
        writer.add_name(name.split("/")[-1] or "Mixtral")
        writer.add_context_length(dims.max_position_embeddings)
        writer.add_embedding_length(dims.hidden_size)
        writer.add_block_count(dims.num_layers)
        writer.add_feed_forward_length(dims.ffn_hidden_size)
        writer.add_head_count(dims.num_attention_heads)
        writer.add_head_count_kv(dims.num_query_groups)
        writer.add_key_length(dims.head_dim)
        writer.add_value_length(dims.head_dim)
        writer.add_rope_dimension_count(dims.head_dim)
        writer.add_rope_freq_base(hf_config.rope_theta(config))
        writer.add_layer_norm_rms_eps(hf_config.value(config, "rms_norm_eps"))
        writer.add_expert_count(dims.num_moe_experts)
        writer.add_expert_used_count(hf_config.value(config, "num_experts_per_tok"))
        writer.add_vocab_size(dims.vocab_size)
        writer.add_file_type(gguf.LlamaFileType[kind.file_type].value)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    gguf = package("gguf")
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return math.prod(shape) // block * nbytes
