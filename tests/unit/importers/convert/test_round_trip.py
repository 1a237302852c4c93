"""HF -> Megatron -> HF changes nothing, whatever the layout, the files and the dtype."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint, parse_size


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("experts", [8, 4])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_bit_identical(make_model, tmp_path: Path, layout: str, shards: int, experts: int, dtype: torch.dtype) -> None:
    folder, config, tensors = make_model(layout=layout, shards=shards, dtype=dtype, num_local_experts=experts)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    back = export_checkpoint(checkpoint, tmp_path / "back", layout=layout)
    assert same(load_model(back), tensors)
    assert json.loads((back / "config.json").read_text()) == config
    assert (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_bin_files(make_model, tmp_path: Path, shards: int) -> None:
    folder, _, tensors = make_model(kind="bin", shards=shards)
    back = export_checkpoint(import_checkpoint(str(folder), tmp_path / "megatron"), tmp_path / "back")
    assert same(load_model(back), tensors)


@pytest.mark.parametrize(("source", "target"), [("v4", "v5"), ("v5", "v4")])
def test_layouts_convert_into_each_other(make_model, tmp_path: Path, source: str, target: str) -> None:
    folder, _, _ = make_model(layout=source)
    _, _, wanted = make_model("other", layout=target)
    back = export_checkpoint(import_checkpoint(str(folder), tmp_path / "megatron"), tmp_path / "back", layout=target)
    assert same(load_model(back), wanted)


def test_grouped_and_single_kv_heads_and_head_dim(make_model, tmp_path: Path) -> None:
    for groups in (1, 4):
        folder, _, tensors = make_model(f"hf{groups}", num_key_value_heads=groups)
        checkpoint = import_checkpoint(str(folder), tmp_path / f"megatron{groups}")
        assert same(load_model(export_checkpoint(checkpoint, tmp_path / f"back{groups}")), tensors)


def test_cast(make_model, tmp_path: Path) -> None:
    folder, _, tensors = make_model(dtype=torch.float32, torch_dtype="float32")
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron", dtype="bf16")
    back = export_checkpoint(checkpoint, tmp_path / "back")
    assert same(load_model(back), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = export_checkpoint(checkpoint, tmp_path / "wide", dtype="fp32")
    assert same(load_model(wide), {name: tensor.bfloat16().float() for name, tensor in tensors.items()})


def test_shards_and_index(make_model, tmp_path: Path) -> None:
    folder, _, tensors = make_model()
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    back = export_checkpoint(checkpoint, tmp_path / "back", max_shard_size="40KB")
    files = sorted(path.name for path in back.glob("*.safetensors"))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all((back / file).stat().st_size < 50_000 for file in files)
    assert same(load_model(back), tensors)
    again = export_checkpoint(import_checkpoint(str(back), tmp_path / "again"), tmp_path / "back2")
    assert same(load_model(again), tensors)


def test_folder_contents(make_model, tmp_path: Path) -> None:
    folder, _, tensors = make_model()
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    manifest = verify(checkpoint)
    assert manifest["kind"] == "model"
    assert set(manifest["tensors"]) == set(tensors)
    assert sorted(path.name for path in (checkpoint / "context").iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]  # no lock, no staging
    back = export_checkpoint(checkpoint, tmp_path / "back")
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    card = (back / "README.md").read_text()
    assert "library_name: transformers" in card
    assert str(tmp_path) not in card


def test_second_import_is_reused_and_a_changed_source_is_not(make_model) -> None:
    folder, _, _ = make_model()
    first = import_checkpoint(str(folder))
    written = (first / "manifest.json").stat().st_mtime_ns
    assert import_checkpoint(f"hf://{folder}") == first
    assert (first / "manifest.json").stat().st_mtime_ns == written
    assert import_checkpoint(str(folder), dtype="fp32") != first
    make_model(seed=1)
    assert import_checkpoint(str(folder)) != first


def test_the_model_card_names_the_chain_and_no_folder_of_this_machine(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    back = export_checkpoint(import_checkpoint(str(folder), tmp_path / "megatron"), tmp_path / "back")
    card = (back / "README.md").read_text()
    record = lineage.read(back)
    assert [link.kind for link in record.ancestors()] == ["export", "model", "source"]
    for link in record.ancestors():
        assert f"| {link.kind} |" in card
        assert link.identity.weights is not None
        assert link.identity.weights[:12] in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500MiB", 500 << 20), ("1.5kb", 1500), ("77", 77)])
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size
    with pytest.raises(CheckpointError, match="is not a size"):
        parse_size("9" * 400 + text)
