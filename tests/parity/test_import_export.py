"""transformers loads what export writes, in either layout, and computes the same; import reads what it saves."""

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.convert.verify import verify_checkpoint
from mixtral_recipes.peft.attach import adapters_of
from mixtral_recipes.peft.dora import DoRAAdapter
from mixtral_recipes.settings.peft import DoRA, LoRA
from tests.distributed.harness import launch
from tests.distributed.small_run import relative_error
from tests.parity.hf_mixtral import Folders, hf_model, our_logits, our_run, save_adapters, tokens

TOLERANCE = 1e-5  # of the largest logit; fp32, four layers


def transformers_logits(folder: Path) -> tuple[Tensor, list[str]]:
    """What transformers says to `tokens`, and which weights it missed."""
    from transformers import MixtralForCausalLM

    hf_model(Folders(folder, folder))
    loaded: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    with torch.no_grad():
        return model(tokens()).logits, [*info["missing_keys"], *info["unexpected_keys"]]


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_transformers_computes_the_same(folders: Folders, tmp_path: Path, shard: str) -> None:
    expected, _ = launch(1, transformers_logits, folders.hf)[0]
    export_checkpoint(folders.megatron, tmp_path / "back", max_shard_size=shard)
    found, wrong = launch(1, transformers_logits, tmp_path / "back")[0]
    assert wrong == []
    assert torch.equal(found, expected)


def save_in_memory_layout(folders: Folders, folder: Path) -> None:
    """A checkpoint with fused experts, as users hold who saved ``model.state_dict()`` themselves."""
    import shutil

    from safetensors.torch import save_file

    model = hf_model(folders)
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    shutil.copyfile(folders.hf / "config.json", folder / "config.json")


def test_fused_experts_as_transformers_holds_them(folders: Folders, tmp_path: Path) -> None:
    """The v5 layout is transformers' own, not only ours: import reads it, export writes it."""
    launch(1, save_in_memory_layout, folders, tmp_path / "fused")
    checkpoint = import_checkpoint(str(tmp_path / "fused"), tmp_path / "megatron")
    assert verify_checkpoint(checkpoint, against=str(folders.hf)).passed
    export_checkpoint(checkpoint, tmp_path / "back", layout="v5")
    from safetensors.torch import load_file

    theirs = load_file(tmp_path / "fused" / "model.safetensors")
    ours = load_file(tmp_path / "back" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_verify_compares_logits(folders: Folders) -> None:
    report = verify_checkpoint(folders.megatron, against=str(folders.hf), logits=True)
    assert report.passed, report
    assert [check.name for check in report.checks][-1] == "logits"


def adapted_logits(folders: Folders, peft: LoRA, saved: Path) -> tuple[Tensor, Path]:
    """Logits of the model under random adapters, experts over the ranks, and the adapters' checkpoint."""
    run = our_run(folders, {"expert_model_parallel_size": torch.distributed.get_world_size()}, peft=peft)
    with torch.no_grad():
        for adapter in adapters_of(run.model):
            random = torch.Generator().manual_seed(zlib.crc32(adapter.layer_name.encode()))
            adapter.lora_b.normal_(std=0.3, generator=random)
            if isinstance(adapter, DoRAAdapter):
                adapter.magnitude.mul_(torch.empty_like(adapter.magnitude).uniform_(0.5, 1.5, generator=random))
    return our_logits(run, tokens()), save_adapters(folders, run, peft, saved)


@pytest.mark.parametrize("peft", [LoRA(dim=4, alpha=8), DoRA(dim=4, alpha=8)], ids=["LoRA", "DoRA"])
def test_merged_adapters_compute_what_the_adapted_model_did(folders: Folders, tmp_path: Path, peft: LoRA) -> None:
    """All four linear layers, every expert; row lengths too under DoRA."""
    expected, checkpoint = launch(2, adapted_logits, folders, peft, tmp_path)[0]
    merged = export_checkpoint(checkpoint, tmp_path / "merged")
    found, wrong = launch(1, transformers_logits, merged)[0]
    assert wrong == []
    assert relative_error(found, expected) < TOLERANCE
    base, _ = launch(1, transformers_logits, folders.hf)[0]
    assert relative_error(base, expected) > 1e-2  # the adapters do something
    card = (merged / "README.md").read_text()
    assert "| adapter | run adapted, step 0 |" in card
    assert str(tmp_path) not in card
