"""A Hugging Face Mixtral on disk, opened for reading: every tensor found, named canonically, and accounted for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.checkpoints.format.rows import Rows
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.errors import CheckpointError, nearest
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf import safetensors as safetensors_io
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.importers.hf.safetensors import StoredTensor
from mixtral_recipes.importers.mapping import FUSED, StoredParts, hf_tensors
from mixtral_recipes.importers.views import Transposed, TurnedHeads
from mixtral_recipes.layout.shapes import ModelShape
from mixtral_recipes.system.json_files import read_object
from mixtral_recipes.system.pointers import refuse_pointer


@dataclass(frozen=True)
class Source:
    """A model of any form that can be imported: every tensor is known to be there, once, in the right shape.

    Attributes:
        folder: Where it is.
        config: config.json, or the one that describes the same model.
        dims: Its sizes.
        layout: "v4" (one tensor per expert), "v5" (fused experts), "mistral", "nemo" or "megatron-lm".
        tensors: canonical name -> its rows.
        weights: The files they are in.
        beside: The folder of what travels with the weights, of which a config.json describes some other model; None
            where it is ``folder``.
    """

    folder: Path
    config: dict[str, Any]
    dims: ModelShape
    layout: str
    tensors: Mapping[str, Rows]
    weights: Sequence[Path]
    beside: Path | None = None

    @property
    def sidecars(self) -> list[Path]:
        """What travels with the weights (`sidecars.of`)."""
        if self.beside is None:
            return sidecars.of(self.folder)
        return [path for path in sidecars.of(self.beside) if path.name != "config.json"]

    @property
    def left_behind(self) -> list[str]:
        """The names of what is in the folder and is neither read nor travels with the weights."""
        if self.beside is not None:
            return []
        used = {path.relative_to(self.folder).as_posix() for path in (*self.sidecars, *self.weights)}
        endings = {path.suffix for path in self.weights}
        used |= {f"{stem}{ending}.index.json" for stem in ("model", "pytorch_model") for ending in endings}
        used |= {"params.json"} if self.layout == "mistral" else set()
        used.add(lineage.NAME)
        return sidecars.left_behind(sidecars.names_in(self.folder), used)


def open_source(folder: Path, *, by_library: bool = False) -> Source:
    """Open a folder with config.json and safetensors or .bin weights.

    Args:
        folder: The folder.
        by_library: Whether safetensors and torch read the tensors (`library`), in place of our own readers.

    Raises:
        CheckpointError: a file, tensor or field is missing, unexpected or wrong; the message names it.
    """
    config = read_config(folder)
    dims = hf_config.dims(config)
    stored, indexed = _stored_tensors(folder, by_library)
    if indexed:
        check_index(folder, stored, indexed)
    layout = "v5" if _has_fused_experts(stored, dims) else "v4"
    files = sorted({path for path, _ in stored.values()})
    check_count(folder, len(stored), dims, fused=layout == "v5")
    tensors = canonical(folder, stored, hf_tensors(dims, fused=layout == "v5"), dims)
    return Source(folder, config, dims, layout, tensors, files)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    path = folder / "config.json"
    if not folder.is_dir() and not (folder.parent / "manifest.json").is_file():
        raise CheckpointError(f"{folder} is not a folder; pass a model folder or hf://org/name.")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it says which model the weights belong to.")
    refuse_pointer(path, CheckpointError)
    return read_object(path, CheckpointError)


def _stored_tensors(folder: Path, by_library: bool) -> tuple[dict[str, tuple[Path, StoredTensor]], dict[str, str]]:
    """Every tensor in a folder's weight files, and the index's opinion."""
    files, indexed = safetensors_io.files_of(folder)
    if files:
        read = safetensors_io.read_header
    else:
        from mixtral_recipes.importers.hf import pickle as pickle_io

        files, indexed = safetensors_io.files_of(folder, pickle_io.INDEX, pickle_io.SINGLE)
        read = pickle_io.read_tensors
    if not files:
        raise CheckpointError(
            f"{folder} has no weights: no {safetensors_io.SINGLE} or {safetensors_io.INDEX} (and no such .bin files)."
        )
    return gather(files, read, by_library=by_library), indexed


def gather(
    files: Sequence[Path], read: Callable[[Path], Mapping[str, StoredTensor]], *, by_library: bool = False
) -> dict[str, tuple[Path, StoredTensor]]:
    """Every tensor of several files, with the file it is in.

    Args:
        files: The files.
        read: Gives the tensors of one.
        by_library: Whether the format's own library reads them instead.

    Raises:
        CheckpointError: one is in two files.
    """
    if by_library:
        from mixtral_recipes.importers.hf.library import read_tensors as read
    found: dict[str, tuple[Path, StoredTensor]] = {}
    for path in files:
        for name, tensor in read(path).items():
            if name in found:
                raise CheckpointError(f"{name} is in both {found[name][0].name} and {path.name}; remove one of them.")
            found[name] = (path, tensor)
    return found


def check_index(folder: Path, stored: dict[str, tuple[Path, StoredTensor]], indexed: dict[str, str]) -> None:
    """Refuse an index that does not say where each tensor is.

    Raises:
        CheckpointError: names the first tensor that is elsewhere or not named.
    """
    for name, file in indexed.items():
        if name not in stored or stored[name][0].name != file:
            raise CheckpointError(f"{folder}: the index says {name} is in {file}, but it is not.")
    for name, (path, _) in stored.items():
        if name not in indexed:
            raise CheckpointError(f"{path}: has {name}, which is not in the index.")


def _has_fused_experts(stored: dict[str, Any], dims: ModelShape) -> bool:
    """Whether the experts are fused; a question of keys, never of the folder's name."""
    fused = [name for name, parts in FUSED.items() if "{expert}" in parts[0]]
    return any(name.format(layer=layer) in stored for name in fused for layer in range(dims.num_layers))


def check_count(folder: Path, stored: int, dims: ModelShape, *, fused: bool, described_by: str = "config.json") -> None:
    """Refuse a configuration of many more tensors than there are, before a name is made for each.

    Args:
        folder: The model.
        stored: How many tensors it has.
        dims: Its sizes, as the configuration says.
        fused: Whether all experts of a layer are in one tensor.
        described_by: The configuration's name.

    Raises:
        CheckpointError: names both numbers.
    """
    experts = 1 if fused else dims.num_moe_experts
    if dims.num_layers * experts > stored:
        raise CheckpointError(
            f"{folder}: {described_by} describes {dims.num_layers} layers of {dims.num_moe_experts} experts, but the "
            f"weights are {stored} tensors, too few for that; one of the two belongs to another model."
        )


def canonical(
    folder: Path,
    stored: Mapping[str, tuple[Path, StoredTensor]],
    expected: Mapping[str, StoredParts],
    dims: ModelShape,
    described_by: str = "config.json",
) -> dict[str, Rows]:
    """The canonical tensors in stored ones, which must be exactly those that a configuration calls for.

    Raises:
        CheckpointError: names one that is missing, unexpected or of another shape.
    """
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    if missing:
        renamed = nearest(missing[0], unexpected) if len(unexpected) == len(missing) else ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: the weights lack {missing[0]}{more}.{renamed}")
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise CheckpointError(
            f"{folder}: the weights have {unexpected[0]}{more}, which the model in {described_by} does not have."
        )
    found: dict[str, Rows] = {}
    for name, parts in expected.items():
        path, tensor = stored[name]
        if tensor.shape != parts.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, but {described_by} requires {list(parts.shape)}."
            )
        rows = tensor.extent.rows // len(parts.names)
        for number, part in enumerate(parts.names):
            extent = tensor.extent.slice(number * rows, rows)
            if parts.order == "interleaved":
                found[part] = TurnedHeads(extent, dims.head_dim)
            else:
                found[part] = Transposed(extent) if parts.order == "transposed" else extent
    return found
