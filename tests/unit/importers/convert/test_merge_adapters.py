"""Adapters added up: the sum of what they change, and nothing else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.convert.merge_adapters import Part, merge_adapters
from mixtral_recipes.importers.convert.stored_adapters import StoredAdapters
from mixtral_recipes.settings.peft import DoRA, LoRA
from tests.adapter_folder import make_adapter

FIRST = LoRA(dim=4, alpha=8, modules_to_save=["output_layer"])
SECOND = LoRA(dim=2, alpha=3, target_modules=["linear_proj", "linear_fc1"], layers="1", experts="2,5")


@pytest.fixture
def base(make_model, tmp_path: Path) -> Path:
    folder, _, _ = make_model(dtype=torch.float32, torch_dtype="float32")
    return import_checkpoint(str(folder), tmp_path / "base", progress=False)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, adapters merged."""
    folder = export_checkpoint(checkpoint, checkpoint.with_name(f"{checkpoint.name}-hf"), progress=False, no_check=True)
    return load_file(folder / "model.safetensors")


def test_the_sum_is_exact_at_the_sum_of_the_ranks(base: Path, tmp_path: Path) -> None:
    a = make_adapter(base, FIRST, tmp_path / "a")
    b = make_adapter(base, SECOND, tmp_path / "b", seed=1)
    made = merge_adapters([Part(a, 0.5), Part(b, -2.0)], tmp_path / "sum")
    assert (made.rank, made.lost) == (6, 0.0)
    start, first, second, found = (weights(folder) for folder in (base, a, b, made.folder))
    for name, tensor in found.items():
        expected = start[name] + 0.5 * (first[name] - start[name]) - 2.0 * (second[name] - start[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
    assert lineage.read(made.folder).origin == {"merged": "0.5 x a + -2 x b"}
    assert [parent.role for parent in lineage.read(made.folder).parents] == ["base", "merged", "merged"]


def test_by_svd_to_a_rank(base: Path, tmp_path: Path) -> None:
    """No matrix of that rank is nearer to the sum (Eckart and Young), and what is left out is told."""
    a, b = (make_adapter(base, LoRA(dim=3, alpha=6), tmp_path / name, seed=s) for s, name in enumerate("ab"))
    exact = StoredAdapters(merge_adapters([Part(a, 0.3), Part(b, 0.7)], tmp_path / "sum").folder)
    made = merge_adapters([Part(a, 0.3), Part(b, 0.7)], tmp_path / "cut", rank=2)
    cut = StoredAdapters(made.folder)
    dropped = kept = 0.0
    for name in ("decoder.layers.1.self_attention.linear_qkv", "decoder.layers.0.mlp.experts.5.linear_fc1"):
        whole, low = exact.read(name), cut.read(name)
        assert whole is not None
        assert low is not None
        assert low.a.shape[0] == 2
        u, s, v = torch.linalg.svd(whole.scale * whole.b @ whole.a)
        torch.testing.assert_close(low.scale * low.b @ low.a, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-4, atol=1e-5)
        dropped, kept = dropped + s[2:].square().sum().item(), kept + s.square().sum().item()
    assert made.lost == pytest.approx((dropped / kept) ** 0.5, rel=0.2)  # all layers are of one kind of values
    assert merge_adapters([Part(a, 1.0)], tmp_path / "same", rank=8).lost == 0.0


def test_what_is_no_sum_is_refused(base: Path, make_model, tmp_path: Path) -> None:
    a = make_adapter(base, LoRA(dim=2, target_modules="attention"), tmp_path / "a")
    dora = make_adapter(base, DoRA(dim=2, target_modules="attention"), tmp_path / "dora")
    other, _, _ = make_model("other", seed=1, dtype=torch.float32, torch_dtype="float32")
    elsewhere = import_checkpoint(str(other), tmp_path / "elsewhere", progress=False)
    b = make_adapter(elsewhere, LoRA(dim=2, target_modules="attention"), tmp_path / "b")
    for parts, message in (
        ([Part(a, 0.5), Part(b, 0.5)], r"base is not the base of .*b: it has weights"),
        ([Part(a, 0.5), Part(dora, 0.5)], "dora is a DoRA adapter"),
        ([Part(base, 1.0)], "holds a whole model, not an adapter"),
        ([Part(a, float("nan"))], "a finite weight other than 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge_adapters(parts, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (make_adapter(base, LoRA(dim=2), tmp_path / name, seed=s) for s, name in enumerate("ab"))
    assert run(["merge", f"{a}:0.5", f"{b}:0.5", str(tmp_path / "out"), "--rank", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["rank"] == 2
    assert 0 < said["lost"] < 1
    assert run(["lineage", str(tmp_path / "out")]) == 0
    assert run(["merge", f"{a}:0.5", str(tmp_path / "out")]) == 2
    assert "out exists" in capsys.readouterr().err
