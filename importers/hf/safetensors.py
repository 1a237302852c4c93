"""The safetensors file format, as far as streaming needs it: where each tensor lies, and the header of a new file.

Source: https://github.com/huggingface/safetensors, "Format": eight bytes header length, JSON header, data.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES, MOST_AXES, Extent, Rows
from mixtral_recipes.errors import CheckpointError, in_short
from mixtral_recipes.system.json_files import parse_object, read_object
from mixtral_recipes.system.pointers import refuse_pointer
from mixtral_recipes.system.schema import typed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 32 << 20  # a third of the reference implementation's limit; the largest Mixtral's takes 0.3


class StoredRows(Rows, Protocol):
    """Rows that a part can be taken of."""

    def slice(self, start: int, rows: int) -> "StoredRows":
        """``rows`` rows from row ``start`` on, as a tensor of their own."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, and its elements as rows of its last axis."""

    shape: tuple[int, ...]
    extent: StoredRows


def stored(path: Path | str, offset: int, dtype: str, shape: Sequence[int]) -> StoredTensor:
    """A contiguous tensor at a place in a file, as rows of its last axis (single numbers for a vector)."""
    width = shape[-1] if len(shape) > 1 else 1
    rows = prod(shape) // width if width else 0
    return StoredTensor(tuple(shape), Extent(str(path), offset, dtype, rows, width * ITEM_BYTES[dtype]))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file.

    Raises:
        CheckpointError: the file is not safetensors, is truncated, or holds a dtype no weight has.
    """
    refuse_pointer(path, CheckpointError)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path}: not a safetensors file, or truncated ({size} bytes); download it again.")
        try:
            header = parse_object(file.read(length))
        except TypeError as error:
            raise CheckpointError(
                f"{path}: its safetensors header does not list tensors; download the file again."
            ) from error
        except ValueError as error:
            raise CheckpointError(
                f"{path}: its safetensors header is not JSON ({in_short(error)}); download the file again."
            ) from error
    typed(header.pop("__metadata__", {}), dict[str, str], f"{path}: __metadata__", CheckpointError)
    tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_covered(path, {name: header[name]["data_offsets"] for name in tensors}, size - 8 - length)
    return tensors


def _check_covered(path: Path, places: dict[str, list[int]], size: int) -> None:
    """Refuse tensors that lie over one another, and bytes that are no tensor's, as safetensors itself does."""
    end, before, unclaimed = 0, "", 0
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start < end:
            raise CheckpointError(f"{path}: {before} and {name} overlap in the file; download the file again.")
        unclaimed += start - end
        end, before = stop, name
    unclaimed += size - end
    if unclaimed:
        raise CheckpointError(f"{path}: {unclaimed} of its bytes belong to no tensor; download the file again.")


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    """One tensor's entry in a header, checked; ``data`` is where the tensors begin, ``size`` the file's length."""
    try:
        start, stop = entry["data_offsets"]
        dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
        if len(shape) > MOST_AXES or not all(type(number) is int for number in (start, stop, *shape)):
            raise TypeError("places and sizes are whole numbers, a few of them")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {name} is not described the way safetensors requires; download the file again."
        ) from error
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype}; only {', '.join(ITEM_BYTES)} can be converted.")
    if start < 0 or min(shape, default=1) < 0 or stop - start != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: {name} is at bytes {start} to {stop}, which does not fit its shape {list(shape)} and dtype "
            f"{dtype}; download the file again."
        )
    if data + stop > size:
        raise CheckpointError(
            f"{path}: {name} ends at byte {data + stop}, but the file has {size}; it is truncated: copy or download it "
            "again."
        )
    return stored(path, data + start, dtype, shape)


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The header of a file that holds ``tensors`` (name -> dtype, shape) one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def split_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names by file, in order, no file larger than ``max_shard_bytes`` unless one tensor is."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_name(index: int, count: int) -> str:
    """The file name transformers gives shard ``index`` (from 0) of ``count``."""
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def files_of(folder: Path, index: str = INDEX, single: str = SINGLE) -> tuple[list[Path], dict[str, str]]:
    """A model's weight files, and which file the index says each tensor is in (empty without an index).

    Raises:
        CheckpointError: there are no weights, or the index is broken, names a file that is not there, or leaves out the
            single file that is.
    """
    refuse_pointer(folder / index, CheckpointError)
    if (folder / index).exists():
        weight_map = read_index(folder / index)
        refuse_two_sets(folder, index, weight_map, single if (folder / single).is_file() else None)
        for name in sorted(set(weight_map.values())):
            if os.path.basename(name) != name or not (folder / name).is_file():
                raise CheckpointError(f"{folder / index}: names {name}, which is not in the folder; download it again.")
        return [folder / name for name in sorted(set(weight_map.values()))], weight_map
    if (folder / single).is_file():
        return [folder / single], {}
    return [], {}


def refuse_two_sets(where: object, index: str, weight_map: dict[str, str], single: str | None) -> None:
    """Refuse a single file beside an index of others: transformers reads the one, and vLLM the others.

    Raises:
        CheckpointError: both are there.
    """
    if single is not None and weight_map and single not in weight_map.values():
        raise CheckpointError(
            f"{where}: has two sets of weights, {single} and the files in {index}; remove one of the two."
        )


def read_index(path: Path) -> dict[str, str]:
    """Which file an index says each tensor is in.

    Raises:
        CheckpointError: it is not an index.
    """
    weight_map = read_object(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: not an index of weight files: it has no weight_map from tensors to files.")
    return weight_map
