"""A model's weights found in a torch_dist folder, however they were split."""

import pickle
from pathlib import Path

import pytest
import torch

from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.reading import close_inputs
from mixtral_recipes.checkpoints.format.restricted_pickle import read_metadata
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.importers.mapping import WEIGHTS, canonical_shapes, canonical_sources, disk_shape
from mixtral_recipes.importers.model_weights import ModelWeights
from tests.torch_dist import halves, save_boxes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


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
    state["optimizer.state.exp_avg.decoder.x"] = torch.zeros(3)
    places = {key: halves(tuple(tensor.shape), max(tensor.dim() - columns, 0)) for key, tensor in state.items()}
    save_boxes(state, places, tmp_path / "weights")
    saved = ModelWeights(StoredWeights(tmp_path / "weights"), dims)
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


def test_gaps_and_missing_weights_are_refused(make_model, tmp_path: Path) -> None:
    folder, config, _ = make_model()
    weights = import_checkpoint(str(folder), tmp_path / "out") / "weights"
    metadata = read_metadata(weights)
    entry = metadata.state_dict_metadata["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    lost = torch.Size((0, 2, 48, 0))  # the up half of one expert
    entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets != lost]  # pyright: ignore[reportAttributeAccessIssue]
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    dims = hf_config.dims(config)
    saved = ModelWeights(StoredWeights(weights), dims)
    fc1 = next(weight for weight in WEIGHTS if weight.transform == "stack")
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight of layer 0, expert 2"):
        saved.matrix(fc1, 0, 2)
    del metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="final_layernorm"):
        ModelWeights(StoredWeights(weights), dims)
