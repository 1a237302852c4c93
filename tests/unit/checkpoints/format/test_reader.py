"""Boxes found and read, whoever wrote them and however they were cut."""

import copyreg
import dataclasses
import io
import itertools
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

from mixtral_recipes.checkpoints.format.archive import find_tensor
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.restricted_pickle import read_metadata
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.format.writer import shard_item, write_file, write_items, write_metadata
from mixtral_recipes.errors import CheckpointError
from tests.torch_dist import halves, save_boxes, window

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def cuts(generator: random.Random, size: int) -> list[tuple[int, int]]:
    inner = sorted(generator.sample(range(1, size), min(2, size - 1)))
    return list(itertools.pairwise([0, *inner, size]))


@pytest.mark.parametrize("writer", ["ours", "torch"])
@pytest.mark.parametrize("seed", range(6))
def test_any_cut_is_read_in_any_other(tmp_path: Path, writer: str, seed: int) -> None:
    """Written in random boxes, read in other random boxes, in other dtypes, several of a rank's from one box."""
    generator = random.Random(seed)
    shape = tuple(generator.randint(2, 9) for _ in range(1 + seed % 4))
    tensor = torch.randn(shape)
    places = [
        (tuple(start for start, _ in box), tuple(stop - start for start, stop in box))
        for box in itertools.product(*(cuts(generator, size) for size in shape))
    ]
    if writer == "torch":
        save_boxes({"w": tensor}, {"w": places}, tmp_path)
    else:
        windows = [tensor[window(*place)] for place in places]
        shards = [Shard("w", part.contiguous(), *place, shape) for part, place in zip(windows, places, strict=True)]
        write_metadata(tmp_path, [write_file(tmp_path, 0, shards, {})])
    stored = StoredWeights(tmp_path)
    wanted = []
    for box in itertools.product(*(cuts(generator, size) for size in shape)):
        sizes = tuple(stop - start for start, stop in box)
        dtype = generator.choice([torch.float32, torch.bfloat16])
        memory = torch.empty(sizes, dtype=dtype).view(generator.choice([sizes, (-1,)]))
        wanted.append(Shard("w", memory, tuple(start for start, _ in box), sizes, shape))
    stored.read_into(wanted)
    for shard in wanted:
        expected = tensor[window(shard.offsets, shard.sizes)]
        assert torch.equal(shard.tensor.view(shard.sizes), expected.to(shard.tensor.dtype))
    assert torch.equal(stored.read_tensor("w", torch.float32), tensor)


def saved(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def repacked(
    content: bytes, change: Callable[[str, bytes], tuple[str, bytes]], kind: int = zipfile.ZIP_STORED
) -> bytes:
    """An archive with its records changed; zipped by Python, so laid out otherwise than torch does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for record in old.infolist():
            new.writestr(*change(record.filename, old.read(record)))
    return buffer.getvalue()


def test_the_place_is_the_archives_own() -> None:
    """Also where the archive is laid out as torch does not, or stands behind other bytes."""
    tensor = torch.randn(5, 6)
    for content in (
        saved(tensor),
        repacked(saved(tensor), lambda name, data: (name.replace("archive", "other"), data)),
    ):
        file = io.BytesIO(b"before" + content + b"after")
        found = find_tensor(file, 6, len(content))
        start = 6 + found.start
        assert (found.shape, found.dtype) == ((5, 6), torch.float32)
        assert file.getvalue()[start : start + 120] == tensor.numpy().tobytes()


def test_a_part_of_a_larger_memory() -> None:
    tensor = torch.arange(40.0).view(8, 5)[2:4]
    content = saved(tensor)
    found = find_tensor(io.BytesIO(content), 0, len(content))
    assert content[found.start : found.start + 40] == tensor.numpy().tobytes()


def test_a_directory_of_many_records() -> None:
    """Each takes Python a kibibyte."""
    entries = (b"PK\1\2" + bytes(42)) * 400_000
    end = b"PK\5\6" + bytes(8) + len(entries).to_bytes(4, "little") + bytes(6)
    with pytest.raises(CheckpointError, match="its directory has 18400000 bytes"):
        find_tensor(io.BytesIO(entries + end), 0, len(entries) + len(end))


def same(name: str, data: bytes) -> tuple[str, bytes]:
    return name, data


REFUSED: dict[str, tuple[str, bytes]] = {
    "compressed": ("compressed", repacked(saved(torch.zeros(50, 50)), same, zipfile.ZIP_DEFLATED)),
    "big-endian": (
        "big-endian",
        repacked(saved(torch.zeros(9)), lambda name, data: (name, b"big" if name.endswith("byteorder") else data)),
    ),
    "transposed": ("transposed", saved(torch.zeros(4, 5).t())),
    "two tensors": ("describes no tensor", saved([torch.zeros(3)] * 2)),  # pyright: ignore[reportArgumentType]
    "a record too short": (
        "needs more bytes than its record",
        repacked(saved(torch.zeros(9)), lambda name, data: (name, data[:20] if "data/" in name else data)),
    ),
    "no record": (
        "no record data/0",
        repacked(saved(torch.zeros(9)), lambda name, data: (name.replace("data/0", "data/1"), data)),
    ),
    "cut off": ("BadZipFile", saved(torch.zeros(9))[:-5]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_archives_are_refused(kind: str) -> None:
    why, content = REFUSED[kind]
    with pytest.raises(CheckpointError, match=why):
        find_tensor(io.BytesIO(content), 0, len(content))


def change_box(metadata: Any) -> None:
    metadata.state_dict_metadata["w"].chunks[1] = ChunkStorageMetadata(torch.Size((4, 0)), torch.Size((4, 5)))


def swap_places(metadata: Any) -> None:
    first, second = metadata.storage_data.values()
    first.offset, second.offset, first.length, second.length = second.offset, first.offset, second.length, first.length


def lose_place(metadata: Any) -> None:
    metadata.storage_data.popitem()


def lose_box(metadata: Any) -> None:
    metadata.state_dict_metadata["w"].chunks.pop()


def widen(metadata: Any) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size((1 << 40, 1 << 40))


def lose_file(metadata: Any) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "nowhere.distcp"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (change_box, "is outside the tensor's shape"),
        (swap_places, "is not the tensor that .metadata describes"),
        (lose_place, "does not say where w"),
        (lose_box, r"w is incomplete: near \[4, 0\], a part is missing"),
        (widen, "needs more bytes than its files have"),
        (lose_file, "'nowhere.distcp', which is not a file"),
    ],
)
def test_metadata_that_does_not_fit_the_files(tmp_path: Path, change: Callable[[Any], None], why: str) -> None:
    save_boxes({"w": torch.randn(7, 5)}, {"w": halves((7, 5), 0)}, tmp_path)
    metadata = read_metadata(tmp_path)
    change(metadata)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=why):
        StoredWeights(tmp_path).read_tensor("w", torch.float32)


def with_properties(metadata: Any, *more: Any) -> bytes:
    """The metadata's pickle with ``more`` behind the first five values of each tensor's properties."""

    def state(properties: TensorProperties) -> Any:
        return copyreg.__newobj__, (TensorProperties,), properties.__getstate__()[:5] + more

    pickler = pickle.Pickler(content := io.BytesIO())
    pickler.dispatch_table = copyreg.dispatch_table | {TensorProperties: state}
    pickler.dump(metadata)
    return content.getvalue()


@pytest.mark.parametrize("more", [(), (None,), ((5, 1),)])
def test_what_each_torch_writes_of_a_tensor(tmp_path: Path, more: tuple[Any, ...]) -> None:
    """Torch 2.15 writes its strides as well."""
    tensor = torch.randn(7, 5)
    save_boxes({"w": tensor}, {"w": halves((7, 5), 0)}, tmp_path)
    (tmp_path / ".metadata").write_bytes(with_properties(read_metadata(tmp_path), *more))
    assert torch.equal(StoredWeights(tmp_path).read_tensor("w", torch.float32), tensor)


@pytest.mark.parametrize("name", ["SavePlan", "MCoreSavePlan"])
def test_plans_that_megatron_leaves_in_the_description(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 0.18 they are of a class of its own, which later releases do not have."""
    tensor = torch.randn(7, 5)
    save_boxes({"w": tensor}, {"w": halves((7, 5), 0)}, tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    (plan,) = metadata.all_local_plans
    if name != "SavePlan":
        module = "megatron.core.dist_checkpointing.strategies.torch"
        kind = dataclasses.make_dataclass(name, [], bases=(SavePlan,), frozen=True)
        kind.__module__ = module
        monkeypatch.setattr(f"{module}.{name}", kind, raising=False)
        plan = kind(**vars(plan))
    metadata.all_local_plans = [plan, plan]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert torch.equal(StoredWeights(tmp_path).read_tensor("w", torch.float32), tensor)
    assert not hasattr(read_metadata(tmp_path), "all_local_plans")


@pytest.mark.parametrize("more", [(5,), ((5, "1"),), ((-5, 1),), (None, None)])
def test_strides_are_numbers(tmp_path: Path, more: tuple[Any, ...]) -> None:
    save_boxes({"w": torch.randn(7, 5)}, {"w": halves((7, 5), 0)}, tmp_path)
    (tmp_path / ".metadata").write_bytes(with_properties(read_metadata(tmp_path), *more))
    with pytest.raises(CheckpointError, match="invalid tensor properties"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "places",
    [
        [((0, 0), (4, 3)), ((2, 0), (4, 3))],  # as many elements as there should be, but two rows twice
        [((0, 0), (6, 3)), ((4, 0), (2, 3))],
        [((0, 0), (4, 3))],
        [((2, 0), (4, 3))],
        [],
    ],
    ids=str,
)
def test_boxes_hold_every_element_once(tmp_path: Path, places: list[Any], padded: bool) -> None:
    """Whoever reads: what no box holds would stay as it was in memory."""
    shards = [Shard("w", torch.ones(sizes), offsets, sizes, (6, 3)) for offsets, sizes in places]
    shards.append(Shard("other", torch.ones(18), (0,), (18,), (18,)))
    write_metadata(tmp_path, write_items(tmp_path, 0, map(shard_item, shards)))
    if not places:
        metadata = read_metadata(tmp_path)
        metadata.state_dict_metadata["w"] = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), torch.Size((6, 3)), []
        )
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (
        lambda stored: stored.read_tensor("w"),
        lambda stored: stored.read_into([Shard("w", torch.empty(18), (0, 0), (6, 3), (6, 3), padded=padded)]),
        lambda stored: stored.matrix("w", None, None),
    ):
        with pytest.raises(CheckpointError, match=r"w is incomplete: near \[\d, \d\]"):
            read(StoredWeights(tmp_path))


def test_a_padded_vocabulary_is_as_wide_as_the_models(tmp_path: Path) -> None:
    write_metadata(tmp_path, [write_file(tmp_path, 0, [Shard("w", torch.ones(48), (0, 0), (8, 6), (8, 6))], {})])
    with pytest.raises(CheckpointError, match=r"w has shape \[8, 6\], but the model needs \[10, 4\]"):
        StoredWeights(tmp_path).read_into([Shard("w", torch.empty(40), (0, 0), (10, 4), (10, 4), padded=True)])


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [(torch.int64, torch.bfloat16), (torch.float32, torch.uint8), (torch.int8, torch.uint8), (torch.bool, torch.int8)],
    ids=str,
)
def test_only_floating_point_becomes_another_type(tmp_path: Path, kept: torch.dtype, wanted: torch.dtype) -> None:
    write_metadata(tmp_path, [write_file(tmp_path, 0, [Shard("w", torch.ones(4, dtype=kept), (0,), (4,), (4,))], {})])
    with pytest.raises(CheckpointError, match=f"w is {kept}, but the model needs {wanted}"):
        StoredWeights(tmp_path).read_tensor("w", wanted)
