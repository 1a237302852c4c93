"""What import writes is what torch.distributed.checkpoint would have written, and reads as such."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mixtral_recipes.checkpoints.format.stream import close_inputs
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert import torch_dist_write
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.torch_dist_read import SavedCheckpoint, read_metadata
from mixtral_recipes.importers.convert.torch_dist_write import ConversionPlanner, chunks_of, object_bytes, share
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.hf.source import open_source
from mixtral_recipes.importers.mapping import WEIGHTS, canonical_shapes, canonical_sources, disk_shape

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")


def read_all(folder: Path, dims: object) -> dict[str, torch.Tensor]:
    state = {weight.disk: torch.zeros(disk_shape(weight, dims), dtype=torch.bfloat16) for weight in WEIGHTS}  # pyright: ignore[reportArgumentType]
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def test_same_as_torchs_own_writer(make_model, tmp_path: Path) -> None:
    """The same planner through torch's FileSystemWriter (via resolve_data) and through ours."""
    folder, _, _ = make_model(num_local_experts=4)
    ours = import_checkpoint(str(folder), tmp_path / "ours")
    source = open_source(folder)
    chunks = chunks_of(source.dims, dict.fromkeys((weight.disk for weight in WEIGHTS), "BF16"))
    planner = ConversionPlanner(source.tensors, chunks, object_bytes(source.dims))
    save({}, storage_writer=FileSystemWriter(tmp_path / "torchs"), planner=planner, no_dist=True)
    close_inputs()
    left, right = read_all(ours / "weights", source.dims), read_all(tmp_path / "torchs", source.dims)
    assert all(torch.equal(left[name], right[name]) for name in left)
    mine, theirs = read_metadata(ours / "weights"), read_metadata(tmp_path / "torchs")
    assert mine.state_dict_metadata == theirs.state_dict_metadata
    assert mine.storage_data.keys() == theirs.storage_data.keys()


def test_experts_are_where_they_belong(make_model, tmp_path: Path) -> None:
    folder, _, tensors = make_model(num_local_experts=4)
    read = read_all(import_checkpoint(str(folder), tmp_path / "out") / "weights", open_source(folder).dims)
    fc1 = read["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    fc2 = read["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
    for layer in range(2):
        for expert in range(4):
            at = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            assert torch.equal(fc1[layer, expert], torch.cat([tensors[at + "w1.weight"], tensors[at + "w3.weight"]]))
            assert torch.equal(fc2[layer, expert], tensors[at + "w2.weight"])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("sizes", [(1, 5), (1, 1, 48, 32), (7,), (1, 64, 33)])
def test_frame_is_torch_saves(dtype: str, sizes: tuple[int, ...]) -> None:
    prefix, suffix = torch_dist_write.torch_save_frame(dtype, sizes)
    tensor = torch.randn(sizes).to(getattr(torch, torch_dist_write.TORCH_NAMES[dtype]))
    data = tensor.view(torch.uint8).numpy().tobytes()
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    assert len(buffer.getvalue()) == len(prefix) + len(data) + len(suffix)
    assert torch.equal(torch.load(io.BytesIO(prefix + data + suffix), weights_only=True), tensor)


@pytest.mark.parametrize("columns", [1, 2])
def test_reads_tensors_split_as_training_splits_them(make_model, tmp_path: Path, columns: int) -> None:
    """Row- and column-parallel boxes, several layers in one box, a padded vocabulary, foreign keys."""
    _, config, _ = make_model(num_local_experts=4)
    dims = hf_config.dims(config)
    state: dict[str, torch.Tensor] = {}
    for weight in WEIGHTS:
        shape = list(disk_shape(weight, dims))
        shape[0] = 384 if weight.shapes[0].startswith("V") else shape[0]
        state[weight.disk] = torch.randn(shape)
    save_in_boxes(state | {"optimizer.state.exp_avg.decoder.x": torch.zeros(3)}, tmp_path / "weights", columns)
    saved = SavedCheckpoint(tmp_path / "weights", dims)
    assert saved.unknown == []
    for name, (weight, layer, expert, ranges) in canonical_sources(dims).items():
        matrix = saved.matrix(weight, layer, expert)
        whole = state[weight.disk][tuple(index for index in (layer, expert) if index is not None)]
        rows = torch.cat([whole[start:stop] for start, stop in ranges])
        got = bytearray()
        for start, stop in ranges:
            out = bytearray((stop - start) * matrix.row_bytes)
            matrix.read(start, stop - start, memoryview(out))
            got += out
        assert got == rows.numpy().tobytes(), name
        assert rows.shape == canonical_shapes(dims)[name]
    close_inputs()


def save_in_boxes(state: dict[str, torch.Tensor], folder: Path, columns: int) -> None:
    """Save each tensor in boxes: halves along the rows, or along the columns, the stacked axes whole."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    boxes: dict[tuple[str, torch.Size], torch.Tensor] = {}
    items = []
    for name, tensor in state.items():
        axis = max(tensor.dim() - columns, 0)
        half = (tensor.shape[axis] + 1) // 2
        for start in (0, half):
            part = tensor.narrow(axis, start, min(half, tensor.shape[axis] - start)).contiguous()
            offsets = torch.Size([start if index == axis else 0 for index in range(tensor.dim())])
            boxes[name, offsets] = part
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, part.shape), TensorProperties(dtype=part.dtype), tensor.shape
            )
            items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            self.plan = SavePlan(items)
            return self.plan

        def create_global_plan(self, all_plans):
            return create_default_global_save_plan(all_plans)

        def resolve_data(self, write_item):
            return boxes[write_item.index.fqn, torch.Size(write_item.index.offset or ())]

    save({}, storage_writer=FileSystemWriter(folder), planner=Planner(), no_dist=True)


def test_gaps_and_missing_weights_are_refused(make_model, tmp_path: Path) -> None:
    folder, config, _ = make_model()
    weights = import_checkpoint(str(folder), tmp_path / "out") / "weights"
    metadata = read_metadata(weights)
    entry = metadata.state_dict_metadata["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    lost = torch.Size((0, 2, 48, 0))  # the up half of one expert
    entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets != lost]  # pyright: ignore[reportAttributeAccessIssue]
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    dims = hf_config.dims(config)
    saved = SavedCheckpoint(weights, dims)
    fc1 = next(weight for weight in WEIGHTS if weight.transform == "stack")
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight of layer 0, expert 2"):
        saved.matrix(fc1, 0, 2)
    del metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="final_layernorm"):
        SavedCheckpoint(weights, dims)


class Hostile:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize("content", [pickle.dumps(Hostile()), b"not a pickle", b""])
def test_metadata_that_is_not_metadata(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_metadata(tmp_path)
    assert capsys.readouterr().out == ""


def test_shares_are_even_and_complete() -> None:
    from mixtral_recipes.importers.mapping import Dims

    dims = Dims(32, 4096, 14336, 32, 8, 128, 8, 32000)
    chunks = chunks_of(dims, dict.fromkeys((weight.disk for weight in WEIGHTS), "BF16"))
    shares = share(chunks, 8)
    sizes = [sum(chunk.nbytes for chunk in part) for part in shares]
    assert sum(sizes) == 2 * 46_702_792_704
    assert max(sizes) < 1.01 * min(sizes)
    assert sorted(map(id, chunks)) == sorted(id(chunk) for part in shares for chunk in part)
