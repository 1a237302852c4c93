"""An imported checkpoint loads under every layout and gives the one-process logits; exports are exact."""

import json
import queue
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.hf import config as hf_config
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.models.builder import build_model
from mixtral_recipes.models.config import MixtralConfig, with_topology
from mixtral_recipes.training import distributed
from tests.distributed.harness import launch
from tests.distributed.small_run import relative_error
from tests.parity.hf_mixtral import Folders, make_model, tokens

TOLERANCE = 1e-5  # of the largest logit; fp32, four layers

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "EP4": (4, {"expert_model_parallel_size": 4}),
    "TP2 EP2": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "sequence_parallel": True,
        },
    ),
    "PP2 EP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "ETP2": (
        2,
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2, "sequence_parallel": True},
    ),
    "TP2 EP2 of 4": (
        4,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True},
    ),
}


@dataclass(frozen=True)
class Imported:
    """A model as transformers saved it, imported, and the one-process logits."""

    folders: Folders
    logits: Tensor


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    folders = launch(1, make_model, str(tmp_path_factory.mktemp("model")))[0]
    logits = launch(1, load_and_run, folders.megatron, {}, None)[0]
    return Imported(folders, logits)


@pytest.mark.parametrize("name", LAYOUTS)
def test_loads_and_saves_under(name: str, imported: Imported, tmp_path: Path) -> None:
    ranks, layout = LAYOUTS[name]
    saved = tmp_path / "saved"
    for logits in launch(ranks, load_and_run, imported.folders.megatron, layout, saved):
        if logits is not None:  # the last pipeline stage has them
            assert logits.shape == imported.logits.shape
            assert relative_error(logits, imported.logits) < TOLERANCE
    shutil.copytree(imported.folders.megatron / "context", saved / "context")
    write_manifest(saved, "training")
    back = export_checkpoint(saved, tmp_path / "back", progress=False)
    theirs, ours = load_file(imported.folders.hf / "model.safetensors"), load_file(back / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_an_import(ranks: int, imported: Imported, tmp_path: Path) -> None:
    """What torchrun does: every process writes its files, one checkpoint comes out."""
    launch(ranks, import_together, imported.folders.hf, tmp_path / "shared")
    manifest = verify(tmp_path / "shared")
    alone = verify(imported.folders.megatron)
    assert manifest["tensors"] == alone["tensors"]
    writers = {name.removeprefix("weights/__")[0] for name in manifest["files"] if name.endswith(".distcp")}
    assert writers == set(map(str, range(ranks)))
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    logits = launch(1, load_and_run, tmp_path / "shared", {}, None)[0]
    assert torch.equal(logits, imported.logits)


def test_a_refusal_reaches_every_process(imported: Imported, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(imported.folders.hf, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_local_experts": 7}))
    messages = launch(2, import_refused, broken, tmp_path / "out")
    assert "experts.7" in messages[0]
    assert messages[0] == messages[1]
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_process_that_fails_stops_all(imported: Imported, tmp_path: Path) -> None:
    """A tensor that one of them reads is not finite."""
    broken = tmp_path / "broken"
    shutil.copytree(imported.folders.hf, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    messages = launch(2, import_refused, broken, tmp_path / "out")
    assert "model.norm.weight: contains NaN or Inf" in messages[0]
    assert messages[0] == messages[1]
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def load_and_run(checkpoint: Path, layout: dict[str, Any], target: Path | None) -> Tensor | None:
    """Build under a layout, load with Megatron's own loader, compute logits, save again in Megatron's format."""
    world = torch.distributed.get_world_size()
    topology = Topology(world_size=world, **layout)
    distributed.initialize(topology, distributed.ProcessPlace.from_environment(), torch.device("cpu"), seed=1)
    fields = hf_config.to_megatron(json.loads((checkpoint / "context" / "config.json").read_text()))
    config = MixtralConfig(
        **fields, seq_length=24, bf16=False, params_dtype=torch.float32, pipeline_dtype=torch.float32
    )
    model = build_model(with_topology(config, topology))
    state = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(model)}
    loaded = cast(dict[str, Any], dist_checkpointing.load(cast(Any, state), str(checkpoint / "weights")))
    for number, chunk in enumerate(model):
        chunk.load_state_dict(loaded[f"model{number}"])
        chunk.eval()
    if target is not None:
        save_again(model, target / "weights")
    return logits_of(model, config.vocab_size)


def save_again(model: list[Any], folder: Path) -> None:
    """Megatron's torch_dist format, by its own strategy."""
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    filesystem_async._results_queue = queue.Queue()  # pyright: ignore  # a process of its own would hold it
    state = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(model)}
    dist_checkpointing.save(cast(Any, state), str(folder))


def logits_of(model: list[Any], vocab_size: int) -> Tensor | None:
    """[rows, length, vocabulary] on the last pipeline stage, whatever the layout."""
    ids = tokens()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    micro_batches = ids.shape[0] if ids.shape[0] % 2 == 0 else 2  # interleaving wants a multiple of the stages
    found = get_forward_backward_func()(
        forward_step_func=lambda batch, chunk: (chunk(ids, positions, None), lambda output, non_loss_data=True: output),
        data_iterator=[None] * len(model),
        model=model,
        num_microbatches=micro_batches,
        seq_length=ids.shape[1],
        micro_batch_size=ids.shape[0],
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    whole = tensor_parallel.gather_from_tensor_model_parallel_region(found[0])
    return whole[..., :vocab_size].detach().float()


def import_together(source: Path, output: Path) -> None:
    """A rank's part of a shared import."""
    assert import_checkpoint(str(source), output) == output


def import_refused(source: Path, output: Path) -> str:
    """What a rank says to a source that is not whole."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  # its text is compared
        import_checkpoint(str(source), output)
    return str(caught.value)
