"""What import writes is what torch.distributed.checkpoint would have written, and reads as such."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from mixtral_recipes.checkpoints.format.restricted_pickle import read_metadata
from mixtral_recipes.checkpoints.format.writer import dealt
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.plan import tensor_items
from mixtral_recipes.importers.hf.source import open_source
from mixtral_recipes.importers.mapping import WEIGHTS, canonical_shapes, disk_shape
from mixtral_recipes.layout.shapes import MIXTRAL_8X7B
from tests.torch_dist import save_boxes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def read_all(folder: Path, dims: object) -> dict[str, torch.Tensor]:
    state = {weight.disk: torch.zeros(disk_shape(weight, dims), dtype=torch.bfloat16) for weight in WEIGHTS}  # pyright: ignore[reportArgumentType]
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def test_same_as_torchs_own_writer(make_model, tmp_path: Path) -> None:
    """torch reads what import wrote; written again by torch, in the same boxes, it is described alike."""
    folder, _, _ = make_model(num_local_experts=4)
    ours = import_checkpoint(str(folder), tmp_path / "ours") / "weights"
    source = open_source(folder)
    dims = source.dims
    state = read_all(ours, dims)
    items = tensor_items(dims, source.tensors, dict.fromkeys(state, "BF16"))
    places = {key: [(item.offsets, item.sizes) for item, _ in items if item.key == key] for key in state}
    save_boxes(state, places, tmp_path / "torchs")
    again = read_all(tmp_path / "torchs", dims)
    assert all(torch.equal(state[name], again[name]) for name in state)
    mine, theirs = read_metadata(ours), read_metadata(tmp_path / "torchs")
    assert {key: mine.state_dict_metadata[key] for key in state} == theirs.state_dict_metadata
    assert {index for index in mine.storage_data if index.fqn in state} == theirs.storage_data.keys()


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


def test_shares_are_even_and_complete() -> None:
    tensors: Any = dict.fromkeys(canonical_shapes(MIXTRAL_8X7B))
    items = tensor_items(MIXTRAL_8X7B, tensors, dict.fromkeys((weight.disk for weight in WEIGHTS), "BF16"))
    shares = dealt(items, 8, lambda pair: pair[1].nbytes)
    sizes = [sum(record.nbytes for _, record in part) for part in shares]
    assert sum(sizes) == 2 * 46_702_792_704
    assert max(sizes) < 1.01 * min(sizes)
    assert sorted(map(id, items)) == sorted(id(pair) for part in shares for pair in part)
