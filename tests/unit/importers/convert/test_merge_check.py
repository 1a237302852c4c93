"""A merged model is compared with base and adapter before it gets its name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_recipes.checkpoints.format.rows import Rows
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.convert.megatron_to_nemo import export_nemo
from mixtral_recipes.importers.convert.merge_check import TOLERANCE, check_merge
from mixtral_recipes.importers.convert.stored_adapters import StoredAdapters
from mixtral_recipes.importers.mapping import Weight
from mixtral_recipes.settings.peft import DoRA, LoRA
from tests.adapter_folder import make_adapter
from tests.mixtral_folder import Tensors

Merged = Callable[..., Rows]


def smaller(tensors: Tensors) -> None:
    """Weights of a size that models have, so that rounding grows as it does in them."""
    for name, tensor in tensors.items():
        if "norm" not in name:
            tensor.mul_(0.15)


@pytest.fixture
def base(make_model, tmp_path: Path) -> Path:
    folder, _, _ = make_model(change=smaller, dtype=torch.float32, torch_dtype="float32")
    return import_checkpoint(str(folder), tmp_path / "base", progress=False)


def test_an_output_layer_of_zeros(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(change=lambda tensors: tensors["lm_head.weight"].zero_(), dtype=torch.float32)
    base = import_checkpoint(str(folder), tmp_path / "base", progress=False)
    checkpoint = make_adapter(base, LoRA(dim=4, alpha=8), tmp_path / "adapter")
    found = lineage.read(export_checkpoint(checkpoint, tmp_path / "v4")).origin["merge_check"]
    assert (found["logits_difference"], found["adapter_effect"]) == (0.0, 0.0)


SCHEMES = [
    LoRA(dim=4, alpha=8),
    DoRA(dim=4, alpha=8),
    LoRA(target_modules=["linear_fc1"], layers="1-", experts="2,5"),
    LoRA(dim=4, alpha=8, modules_to_save=["word_embeddings", "output_layer"]),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_right_merge_is_within_rounding_in_every_form(base: Path, tmp_path: Path, scheme: LoRA) -> None:
    checkpoint = make_adapter(base, scheme, tmp_path / "adapter")
    forms = {
        "v4": export_checkpoint(checkpoint, tmp_path / "v4"),
        "v5": export_checkpoint(checkpoint, tmp_path / "v5", layout="v5"),
        "nemo": export_nemo(checkpoint, tmp_path / "nemo"),
    }
    for form, folder in forms.items():
        found = lineage.read(folder).origin["merge_check"]
        assert 0 < found["logits_difference"] < 1e-5, form
        assert found["adapter_effect"] > 0.05, form
    said = lineage.read(forms["v4"]).origin["merge_check"]["logits_difference"]
    assert f"those of base plus unmerged adapter by {said:.1e}" in (forms["v4"] / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_to_16_bits_is_no_fault(base: Path, tmp_path: Path, dtype: str) -> None:
    checkpoint = make_adapter(base, LoRA(dim=4, alpha=8), tmp_path / "adapter")
    folder = export_checkpoint(checkpoint, tmp_path / "merged", dtype=dtype)
    found = lineage.read(folder).origin["merge_check"]
    assert 1e-5 < found["logits_difference"] < TOLERANCE[found["dtype"]]


def without_adapter(merged: Merged, weight: Weight, layer: int, expert: int, rows: Rows, dtype: str | None) -> Rows:
    return rows


def another_experts(
    merged: Merged, weight: Weight, layer: int, expert: int | None, rows: Rows, dtype: str | None
) -> Rows:
    return merged(weight, layer, None if expert is None else expert ^ 1, rows, dtype)


@pytest.mark.parametrize("wrong", [without_adapter, another_experts])
def test_a_wrong_merge_gets_no_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., Rows]
) -> None:
    checkpoint = make_adapter(base, LoRA(dim=4, alpha=8), tmp_path / "adapter")
    right = StoredAdapters.merged
    monkeypatch.setattr(StoredAdapters, "merged", lambda *args: wrong(right.__get__(args[0]), *args[1:]))
    monkeypatch.setattr(StoredAdapters, "check_all_read", lambda self: None)
    with pytest.raises(CheckpointError, match=r"merged model is wrong: logits .* pass --no-check to write it"):
        export_checkpoint(checkpoint, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    export_checkpoint(checkpoint, tmp_path / "merged", no_check=True)
    assert "merge_check" not in lineage.read(tmp_path / "merged").origin


def test_a_small_adapter_that_is_left_out_is_missed(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its effect is below what rounding to bf16 may do; and where rounding blurs it, the card says so."""
    folder, _, _ = make_model(change=smaller)
    base = import_checkpoint(str(folder), tmp_path / "base", progress=False)
    checkpoint = make_adapter(base, LoRA(dim=4, alpha=4), tmp_path / "adapter", size=0.01)
    blurred = export_checkpoint(checkpoint, tmp_path / "merged")
    assert "rounding loses much of that change, and --dtype fp32 would keep it" in (blurred / "README.md").read_text()
    kept = export_checkpoint(checkpoint, tmp_path / "kept", dtype="fp32")
    assert lineage.read(kept).origin["merge_check"]["logits_difference"] < 1e-5
    monkeypatch.setattr(StoredAdapters, "merged", lambda self, weight, layer, expert, rows, dtype: rows)
    monkeypatch.setattr(StoredAdapters, "check_all_read", lambda self: None)
    with pytest.raises(CheckpointError, match="computes the same as the base without the adapter"):
        export_checkpoint(checkpoint, tmp_path / "without")


def test_what_was_written_is_what_is_compared(base: Path, tmp_path: Path) -> None:
    checkpoint = make_adapter(base, LoRA(dim=4, alpha=8), tmp_path / "adapter")
    merged = export_checkpoint(checkpoint, tmp_path / "merged")
    file = merged / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight"].neg_()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="model is wrong"):
        check_merge(checkpoint, base, merged)


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_adapter(base, LoRA(dim=4, alpha=8), tmp_path / "adapter")
    assert run(["export", str(checkpoint), str(tmp_path / "merged"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["merge_check"]["logits_difference"] < TOLERANCE["F32"]
    assert run(["export", str(checkpoint), str(tmp_path / "other"), "--no-check", "--json"]) == 0
    assert "merge_check" not in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert run(["export", str(checkpoint), str(tmp_path / "p"), "--format", "peft", "--no-check"]) == 2
    assert "--no-check has no effect with --format peft" in capsys.readouterr().err
