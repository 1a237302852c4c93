"""peft loads the adapters that export writes, in either layout, and computes what the merged model computes, fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.peft.export import export_adapter
from mixtral_recipes.settings.peft import DoRA, LoRA
from tests.distributed.harness import launch
from tests.distributed.small_run import fill, relative_error
from tests.parity.hf_mixtral import Folders, hf_model, our_run, save_adapters, tokens

TOLERANCE = 1e-5  # of the largest logit; fp32, four layers
ATTENTION = ["linear_qkv", "linear_proj"]
EXPERTS = ["linear_fc1", "linear_fc2"]
SCHEMES = {
    "uneven alpha": LoRA(dim=8, alpha=12),
    "attention": LoRA(dim=4, alpha=8, target_modules=ATTENTION),
    "experts": LoRA(dim=4, alpha=8, target_modules=EXPERTS),
    "second projection": LoRA(dim=4, alpha=8, target_modules=["linear_fc2"]),
    "first projection": LoRA(dim=4, alpha=8, target_modules=["linear_fc1"]),
    "first projection of another rank": LoRA(
        dim=4, alpha=8, target_modules=["linear_fc1", *ATTENTION], rank_pattern={"linear_fc1": 2}
    ),
    "twice the rank is the others'": LoRA(dim=8, alpha=8, rank_pattern={"linear_fc1": 4}),
    "twice the alpha is the others'": LoRA(dim=4, alpha=16, alpha_pattern={"linear_fc1": 8}),
    "rslora": LoRA(dim=4, alpha=8, use_rslora=True),
    "uneven ranks": LoRA(
        dim=4, alpha=8, rank_pattern={"linear_fc1": 2, "linear_qkv": 6}, alpha_pattern={"linear_fc2": 3}
    ),
    "some layers": LoRA(dim=4, alpha=8, layers="1,3-"),
    "some experts": LoRA(dim=4, alpha=8, experts={"0": [1, 5], "1": [], "2": [2, 3], "3": [0, 7]}),
    "whole modules": LoRA(
        dim=4, alpha=8, target_modules=ATTENTION, modules_to_save=["word_embeddings", "output_layer"]
    ),
}
LAYOUTS = {
    "ep2": {"expert_model_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
    "etp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
}


def filled_adapter(folders: Folders, peft: LoRA, saved: Path, layout: dict[str, Any]) -> Path:
    """A checkpoint of adapters whose values are the same in every layout."""
    run = our_run(folders, layout, peft=peft)
    fill(run.model, adapters=True)
    return save_adapters(folders, run, peft, saved)


def merged_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return hf_model(Folders(folder, folder))(tokens()).logits


def peft_logits(folders: Folders, adapter: Path) -> Tensor:
    """What peft computes with an adapter folder on the base; fails on a key it does not know or misses."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        model: Any = PeftModel.from_pretrained(hf_model(folders), adapter)
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_peft_computes_what_the_merged_model_does(folders: Folders, tmp_path: Path, scheme: str) -> None:
    checkpoint = launch(1, filled_adapter, folders, SCHEMES[scheme], tmp_path / "run", {})[0]
    expected = launch(1, merged_logits, export_checkpoint(checkpoint, tmp_path / "merged"))[0]
    base = launch(1, merged_logits, folders.hf)[0]
    assert relative_error(base, expected) > 1e-2  # the adapters do something
    for layout in ("v4", "v5"):
        folder = export_adapter(checkpoint, tmp_path / layout, layout=layout)
        found = launch(1, peft_logits, folders, folder)[0]
        assert relative_error(found, expected) < TOLERANCE, layout


def test_dora_on_attention(folders: Folders, tmp_path: Path) -> None:
    peft = DoRA(dim=4, alpha=8, target_modules=ATTENTION)
    checkpoint = launch(1, filled_adapter, folders, peft, tmp_path / "run", {})[0]
    expected = launch(1, merged_logits, export_checkpoint(checkpoint, tmp_path / "merged"))[0]
    folder = export_adapter(checkpoint, tmp_path / "adapter")
    assert relative_error(launch(1, peft_logits, folders, folder)[0], expected) < TOLERANCE
    assert "vLLM cannot load this adapter" in (folder / "README.md").read_text()


def test_dora_on_experts_is_refused(folders: Folders, tmp_path: Path) -> None:
    checkpoint = launch(1, filled_adapter, folders, DoRA(dim=4, alpha=8), tmp_path / "run", {})[0]
    with pytest.raises(CheckpointError, match=r"DoRA on the experts .* use --format hf, which merges"):
        export_adapter(checkpoint, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bytes(folders: Folders, tmp_path: Path, layout: str) -> None:
    peft = LoRA(dim=4, alpha=8)
    alone = launch(1, filled_adapter, folders, peft, tmp_path / "alone", {})[0]
    split = launch(2, filled_adapter, folders, peft, tmp_path / "split", LAYOUTS[layout])[0]
    for form in ("v4", "v5"):
        one = export_adapter(alone, tmp_path / f"one-{form}", layout=form)
        two = export_adapter(split, tmp_path / f"two-{form}", layout=form)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (one / name).read_bytes() == (two / name).read_bytes()


def test_what_vllm_takes(folders: Folders, tmp_path: Path) -> None:
    """Its Mixtral matches per-expert names only, no router, no dropout-free surprises; and its rank limit is named."""
    peft = LoRA(dim=32, alpha=32)
    checkpoint = launch(1, filled_adapter, folders, peft, tmp_path / "run", {})[0]
    folder = export_adapter(checkpoint, tmp_path / "adapter")
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        shape = file.get_slice(
            "base_model.model.model.layers.0.block_sparse_moe.experts.7.w2.lora_A.weight"
        ).get_shape()
    assert shape == [32, 48]
    assert not [name for name in names if ".gate." in name or "base_layer" in name]
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    assert "--max-lora-rank 32" in (folder / "README.md").read_text()
