"""What the writer writes is what torch writes, and torch reads it."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from mixtral_recipes.checkpoints.format import stream
from mixtral_recipes.checkpoints.format.archive import frame
from mixtral_recipes.checkpoints.format.integrity import damage_of
from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.format.writer import write_file, write_metadata
from mixtral_recipes.system.files import sha256

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8])
@pytest.mark.parametrize("sizes", [(1, 5), (1, 1, 48, 32), (7,), (1, 64, 33), ()])
def test_frame_is_torch_saves(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    prefix, suffix = frame(dtype, sizes)
    tensor = (100 * torch.randn(sizes)).to(dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    assert len(buffer.getvalue()) == len(prefix) + len(data) + len(suffix)
    assert torch.equal(torch.load(io.BytesIO(prefix + data + suffix), weights_only=True), tensor)


def whole(key: str, tensor: torch.Tensor) -> Shard:
    shape = tuple(tensor.shape)
    return Shard(key, tensor, (0,) * len(shape), shape, shape)


def test_torch_reads_what_two_ranks_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are views, hold anything, and have several dtypes; with files hashed in several pieces."""
    monkeypatch.setattr(stream, "_PIECE_BYTES", 5000)
    weights = tmp_path / "weights"
    weights.mkdir()
    table = torch.randn(40, 1000)
    table[3, 4], table[30, 2] = float("nan"), float("inf")
    rest = {"half": torch.randn(3, 5).bfloat16(), "steps": torch.arange(7), "one": torch.tensor(2.5)}
    upper = Shard("table", table[:16], (0, 0), (16, 1000), (40, 1000))
    lower = Shard("table", table[16:].reshape(-1), (16, 0), (24, 1000), (40, 1000))
    files = [
        write_file(weights, 0, [upper, whole("half", rest["half"])], {}),
        write_file(weights, 1, [lower, whole("steps", rest["steps"]), whole("one", rest["one"])], {}),
    ]
    write_metadata(weights, files)
    state = {"table": torch.zeros(40, 1000)} | {key: torch.zeros_like(tensor) for key, tensor in rest.items()}
    load(state, storage_reader=FileSystemReader(weights), no_dist=True)
    for key, tensor in ({"table": table} | rest).items():
        assert torch.equal(state[key].nan_to_num(7.0), tensor.nan_to_num(7.0)), key
        read = StoredWeights(weights).read_tensor(key, tensor.dtype)
        assert torch.equal(read.nan_to_num(7.0), tensor.nan_to_num(7.0)), key
    for file in files:
        start = 0
        assert len(file.pieces) > 1
        for length, digest in file.pieces:
            assert sha256(weights / file.name, start, length) == digest
            start += length
        assert start == (weights / file.name).stat().st_size
    write_manifest(tmp_path, "training", known={f"weights/{file.name}": file.pieces for file in files})
    assert damage_of(tmp_path) is None


def test_an_earlier_torch_reads_what_a_later_one_writes(tmp_path: Path) -> None:
    """Torch 2.14 and before take five values for a tensor's properties; 2.15 pickles six."""
    write_metadata(tmp_path, [write_file(tmp_path, 0, [whole("w", torch.ones(2, 3)), whole("x", torch.ones(2))], {})])
    states = []

    class Properties:
        def __setstate__(self, state: Any) -> None:
            states.append(state)

    class Earlier(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return Properties if name == "TensorProperties" else super().find_class(module, name)

    Earlier(io.BytesIO((tmp_path / ".metadata").read_bytes())).load()
    assert [len(state) for state in states] == [5, 5]
