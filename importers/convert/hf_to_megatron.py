"""Hugging Face -> Megatron: any Mixtral folder or Hub repository into a torch_dist checkpoint, streamed."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.checkpoints.format.rows import TORCH_NAMES
from mixtral_recipes.checkpoints.format.stream import Stream
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.checkpoints.lineage.identity import Identity, hash_of_tensors
from mixtral_recipes.checkpoints.lineage.links import source_parent
from mixtral_recipes.checkpoints.lineage.record import Lineage
from mixtral_recipes.checkpoints.publish import publish
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem, nearest
from mixtral_recipes.importers import locations
from mixtral_recipes.importers.convert import kept
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.importers.hf.source import Source
from mixtral_recipes.importers.mapping import canonical_shapes
from mixtral_recipes.importers.open import open_model
from mixtral_recipes.system.files import replacing_folder, write_json
from mixtral_recipes.system.locks import held
from mixtral_recipes.system.machine import io_threads
from mixtral_recipes.system.progress import progress_bar
from mixtral_recipes.system.ranks import first, first_holds, joined, rank_and_size, shared
from mixtral_recipes.system.remembered import settled_state

if TYPE_CHECKING:
    from mixtral_recipes.checkpoints.format.writer import WrittenFile

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ROOM_FOR_THE_REST = 64 << 20  # metadata, tokenizer, alignment


def import_checkpoint(
    source: str,
    output: Path | None = None,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    threads: int | None = None,
    accept: Callable[[Source], object] | None = None,
) -> Path:
    """Convert a Hugging Face Mixtral into a Megatron checkpoint that loads at any parallel layout.

    Without ``output`` the result is kept under `models_home`, and the same source is converted once: a second call, or
    a second process, gets the first one's result, if the source's revision or content says that it is the same
    (`kept`). Under torchrun, or where torch.distributed is initialised, all processes must call this together and share
    the work.

    Args:
        source: ``hf://org/name[@revision]``, or a model folder.
        output: Where to put the checkpoint; must not exist.
        dtype: "bf16", "fp16" or "fp32"; None keeps each tensor's own.
        overwrite: Replace an existing checkpoint.
        progress: Show a progress bar on a terminal.
        threads: Files written at once per process; None decides by the cores there are.
        accept: Called with the opened source before anything is written; raises to refuse it.

    Returns:
        The checkpoint folder.

    Raises:
        CheckpointError: the source is not a whole, finite, supported Mixtral; the message names what is wrong.
        EnvironmentProblem: the disk has too little room, or the Hub cannot be reached.
    """
    wanted = dtype_of(dtype)
    with joined() as group:
        folder, origin = first(lambda: fetch(source, progress=progress), group)
        opened = open_model(folder)
        if accept is not None:
            accept(opened)
        if "path" in origin:
            origin["path"] = str(opened.folder)  # of a checkpoint whose weights/ was given, the folder above
        left_behind = origin.pop("left_behind", []) or opened.left_behind
        place = Path(os.path.abspath(output)) if output else kept.place_of(opened, origin, wanted)

        def find() -> tuple[Path, bool]:
            folder, there = (place, False) if output else kept.find(place, opened, origin)
            return folder, there and not overwrite

        final, there = first(find, group)  # it may be in a home folder that nobody here may write to
        if there:
            return final
        with first_holds(lambda: nullcontext() if output else held(place), group):
            final, there = first(find, group)  # another process may have made it while this one waited
            if there:
                return final
            before = settled_state(opened.weights)

            def staged() -> AbstractContextManager[Path]:
                if output is None:  # of what is kept here, only a damaged one is still there
                    return replacing_folder(final)
                return publish(final, "model", overwrite=overwrite, sources=(folder, opened.folder))

            with first_holds(staged, group) as staging:
                job = _Import(opened, origin, left_behind, wanted, staging, group)
                job.run(threads or io_threads(rank_and_size()[1]), progress=progress)
            if output is None:
                first(lambda: kept.note(final, opened, since=before), group)
    return final


def dtype_of(name: str | None) -> str | None:
    """A dtype option in safetensors' spelling."""
    if name is None:
        return None
    if name not in DTYPES:
        raise CheckpointError(f"--dtype {name} is not a known dtype.{nearest(name, list(DTYPES))}")
    return DTYPES[name]


def fetch(source: str, *, progress: bool) -> tuple[Path, dict[str, Any]]:
    """A local folder for the source, and where it came from."""
    where = locations.parse_source(source)
    if isinstance(where, Path):
        return where, {"path": str(where)}
    from mixtral_recipes.importers.hf.hub import download

    folder, commit, left_behind = download(where, progress=progress)
    return folder, {"id": f"hf://{where.repo}", "revision": commit, "left_behind": left_behind}


@dataclass
class _Import:
    """One conversion, from an opened source into a staging folder."""

    source: Source
    origin: dict[str, Any]
    left_behind: list[str]
    dtype: str | None
    staging: Path
    group: Any  # of the processes that share the work

    def run(self, threads: int, *, progress: bool) -> None:
        """Write weights, context and manifest; this process does its share."""
        from mixtral_recipes.checkpoints.format.writer import dealt, write_items
        from mixtral_recipes.importers.convert.plan import common_item, object_items, stacked_dtypes, tensor_items

        dims, tensors = self.source.dims, self.source.tensors
        wanted = {name: self.dtype or rows.dtype for name, rows in tensors.items()}
        items = tensor_items(dims, tensors, stacked_dtypes(dims, wanted, self.source.folder))
        total = sum(record.nbytes for _, record in items)
        weights = self.staging / "weights"
        rank, count = rank_and_size()
        first(lambda: _prepare(weights, total), self.group)
        mine = dealt(items, count, lambda pair: pair[1].nbytes)[rank]
        objects = [common_item(), *object_items(dims)] if rank == 0 else []

        def write() -> "tuple[list[WrittenFile], dict[str, str]]":
            nbytes = sum(record.nbytes for _, record in mine)
            with progress_bar("Importing", nbytes, shown=progress and rank == 0) as on_bytes:
                stream = Stream(threads, on_bytes)
                return write_items(weights, rank, objects + mine, stream), stream.digests

        written = shared(write, self.group)
        first(lambda: self._finish(wanted, written), self.group)

    def _finish(self, dtypes: dict[str, str], gathered: "list[tuple[list[WrittenFile], dict[str, str]]]") -> None:
        """Write everything but the tensors, the manifest last."""
        from mixtral_recipes.checkpoints.format.writer import write_metadata

        files = [file for part, _ in gathered for file in part]
        write_metadata(self.staging / "weights", files)
        context = self.staging / "context"
        context.mkdir()
        sidecars.copy(self.source.sidecars, self.source.beside or self.source.folder, context)
        if not (context / "config.json").exists():  # the source describes itself in another form
            write_json(context / "config.json", self.source.config)
        _change_config(context / "config.json", hf_config.without_window_and_scaling)
        if self.dtype:
            set_dtype(context / "config.json", self.dtype)
        digests = {name: digest for _, part in gathered for name, digest in part.items()}
        shapes = canonical_shapes(self.source.dims)
        tensors = {
            name: {"dtype": dtypes[name], "shape": list(shape), "sha256": digests[name]}
            for name, shape in shapes.items()
        }
        cast = any(self.source.tensors[name].dtype != entry["dtype"] for name, entry in tensors.items())
        identity = Identity.of(hash_of_tensors(tensors), context)
        parent = source_parent(self.source.folder, self.origin, None if cast else identity.weights)
        lineage.write(self.staging, Lineage("model", identity, parents=(parent,)))
        write_manifest(
            self.staging,
            "model",
            source=self.origin | {"layout": self.source.layout},
            known={f"weights/{file.name}": file.pieces for file in files},
            tensors=tensors,
            extra={"left_behind": self.left_behind},
        )


def _prepare(weights: Path, total: int) -> None:
    check_room(weights.parent, total)
    weights.mkdir()


def check_room(folder: Path, nbytes: int) -> None:
    """Refuse to start writing what the disk cannot hold.

    Raises:
        EnvironmentProblem: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(folder).free
    needed = nbytes + _ROOM_FOR_THE_REST
    if free < needed:
        raise EnvironmentProblem(
            f"{folder.parent}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; free some space or choose "
            "another folder."
        )


def set_dtype(config: Path, dtype: str) -> None:
    """Set the weights' dtype in a config.json, under every key it has for it; leave it alone if it is right."""

    def change(content: dict[str, Any]) -> dict[str, Any]:
        keys = [key for key in ("dtype", "torch_dtype") if key in content] or ["torch_dtype"]
        return content | dict.fromkeys(keys, TORCH_NAMES[dtype])

    _change_config(config, change)


def _change_config(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a JSON file again if that changes anything but its spelling."""
    content = json.loads(path.read_text())
    if (new := change(content)) != content:
        path.write_text(json.dumps(new, indent=2) + "\n")
