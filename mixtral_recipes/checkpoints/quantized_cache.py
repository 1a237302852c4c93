"""A quantised base kept on disk, so that the next run reads a quarter of the bytes and quantises nothing.

Codes and scales are plain tensors in the form of any checkpoint, cut as the weights are: whatever layout wrote them,
any other reads its part. They belong to one base, one format and one kind of device, which their folder is named after.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtral_recipes.checkpoints.format.integrity import damage_together
from mixtral_recipes.checkpoints.format.manifest import read_manifest, write_manifest
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.format.writer import shard_item, write_items, write_metadata
from mixtral_recipes.checkpoints.lineage.identity import identity_of
from mixtral_recipes.checkpoints.shards import QuantizedWeight, write_shares
from mixtral_recipes.errors import EnvironmentProblem, of_the_machine
from mixtral_recipes.peft.quantized.int8 import Int8
from mixtral_recipes.peft.quantized.layers import Format, Quantized
from mixtral_recipes.peft.quantized.nf4 import NESTED, NF4
from mixtral_recipes.system.files import remove_folder, replacing_folder
from mixtral_recipes.system.home import home
from mixtral_recipes.system.locks import held
from mixtral_recipes.system.ranks import first, first_holds, gathered, rank_and_size, shared

_FORM = 1  # raise it when other bytes are made of the same base, or they lie otherwise: what is kept is then made anew


def cache_folder(base: Path, format: Format, device: torch.device) -> Path:
    """Where a base is kept in a format.

    Args:
        base: The checkpoint it is quantised from.
        format: What it is quantised to.
        device: Where; bytes differ a little (`peft/quantized/nf4.py`).
    """
    name = f"nf4-{format.block}" if format.bits == 4 else "int8"
    return home() / "quantized" / f"{identity_of(base).weights}-{name}-{device.type}"


def read_cached(folder: Path, weights: list[QuantizedWeight]) -> bool:
    """Give layers their weights from what is kept; all ranks call it together.

    Returns:
        False where nothing whole of today's form is there: it is then made anew.
    """
    if not first(folder.is_dir):
        return False
    if damage_together(folder) is not None or first(lambda: read_manifest(folder).get("source")) != _source(folder):
        first(lambda: _remove(folder))
        return False
    stored = StoredWeights(folder / "weights")
    for weight in weights:
        empty = _empty(weight)
        stored.read_into(list(_shards(weight, empty)))
        weight.layer.quantized = _on(empty, weight.layer.device)
    return True


def write_cache(folder: Path, weights: list[QuantizedWeight]) -> None:
    """Keep layers' weights, or say why they cannot be kept; all ranks call it together."""
    try:
        with first_holds(lambda: _staging(folder)) as staging:
            if staging is not None:
                _write(staging, folder, weights)
    except (OSError, EnvironmentProblem) as error:
        if rank_and_size()[0] == 0:
            problem = of_the_machine(error) or error
            print(f"WARNING: the quantised base was not cached (peft.cache): {problem}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path | None]:
    """The folder to write into; None where another run was faster."""
    with held(folder):
        if folder.exists():
            yield None
            return
        with replacing_folder(folder) as staging:
            (staging / "weights").mkdir()
            yield staging


def _source(folder: Path) -> dict[str, Any]:
    """What the manifest says it was made from, and how."""
    return {"folder": folder.name, "form": _FORM}


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # in a home that may only be read it stays, and is passed over
        remove_folder(folder)


def _write(staging: Path, folder: Path, weights: list[QuantizedWeight]) -> None:
    shards = [shard for weight in weights for shard in _shards(weight, weight.layer.quantized)]
    places = gathered([(shard.place, shard.nbytes) for shard in shards])
    rank, _ = rank_and_size()
    mine = {shard.place: shard for shard in shards}
    items = [shard_item(mine[place]) for place in sorted(write_shares(places)[rank])]
    written = shared(lambda: write_items(staging / "weights", rank, items))
    files = [file for of_rank in written for file in of_rank]  # none of a rank whose every part others write

    def complete() -> None:
        write_metadata(staging / "weights", files)
        known = {f"weights/{file.name}": file.pieces for file in files}
        write_manifest(staging, "quantized", source=_source(folder), known=known)

    first(complete)


def _empty(weight: QuantizedWeight) -> Quantized:
    """A weight to read into, on the CPU."""
    layer = weight.layer
    rows, columns = layer.weight.shape
    if layer.format.bits == 8:
        return Int8(torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows), layer.split)
    block = layer.format.block
    lines, width = (rows, columns) if columns % block == 0 else (rows * columns // block, block)
    return NF4(
        torch.empty(lines, width // 2, dtype=torch.uint8),
        torch.empty(lines, width // block, dtype=torch.uint8),
        torch.empty(-(-rows * columns * layer.split.size // (block * NESTED))),
        torch.empty(()),
        (rows, columns),
        block,
        layer.split,
    )


def _on(weight: Quantized, device: torch.device) -> Quantized:
    moved: Any = {name: tensor.to(device) for name, tensor in weight.tensors().items()}
    return replace(weight, **moved)


def _shards(weight: QuantizedWeight, quantized: Quantized) -> Iterator[Shard]:
    """A weight's tensors with their places, cut as the pieces of the weight are."""
    pieces, tensors = weight.pieces(), quantized.tensors()
    start = 0
    for piece in pieces:
        for name in ("codes", "absmax"):
            yield _box(f"{weight.key}.{name}", tensors[name], weight.layer.weight.shape, piece, start)
        start += piece.sizes[-2]
    lead = len(pieces[0].sizes) - 2
    for name in tensors.keys() - {"codes", "absmax"}:  # of the whole matrix, the same on every rank that has a part
        flat = tensors[name].view(-1)
        offsets, whole = (*pieces[0].offsets[:lead], 0), (*pieces[0].whole[:lead], flat.numel())
        yield Shard(f"{weight.key}.{name}", flat, offsets, (1,) * lead + (flat.numel(),), whole)


def _box(key: str, tensor: Tensor, shape: torch.Size, piece: Shard, start: int) -> Shard:
    """The part of a tensor that belongs to a piece of the weight.

    Args:
        key: The tensor's name.
        tensor: [lines, width] or [lines]: of codes or scales, on a line for each row, or several where blocks cross
            rows.
        shape: [rows, columns] of the weight.
        piece: Some rows of it.
        start: The first of them.
    """
    (rows, columns), (lines, *widths) = shape, tensor.shape

    def down(count: int) -> int:
        return count * lines // rows

    def across(count: int) -> tuple[int, ...]:
        return tuple((width if count else 0) if lines != rows else count * width // columns for width in widths)

    (*lead, row, column), (*ones, count, _), (*outer, all_rows, all_columns) = piece.offsets, piece.sizes, piece.whole
    return Shard(
        key,
        tensor[down(start) : down(start + count)],
        (*lead, down(row), *across(column)),
        (*ones, down(count), *across(columns)),
        (*outer, down(all_rows), *across(all_columns)),
    )
