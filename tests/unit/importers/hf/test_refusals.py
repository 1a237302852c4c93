"""What is refused: in one line that names the culprit, leaving nothing under the final name."""

import errno
import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem, MixtralRecipesError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint, parse_size
from mixtral_recipes.importers.convert.megatron_to_nemo import export_nemo
from mixtral_recipes.importers.hf import source as source_module
from mixtral_recipes.importers.hf.safetensors import read_header

EXPERT = "model.layers.1.block_sparse_moe.experts.3."


def refused(source: Path, output: Path, *words: str, error: type[MixtralRecipesError] = CheckpointError) -> str:
    """Import, expecting a one-line error with these words, and nothing left behind."""
    before = sorted(path.name for path in output.parent.iterdir())
    with pytest.raises(error) as caught:
        import_checkpoint(str(source), output)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert sorted(path.name for path in output.parent.iterdir()) == before
    return message


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any], data: Callable[[bytes], bytes] = bytes) -> None:
    """Give a safetensors file another header, and other data."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    text = json.dumps(change(json.loads(content[8:end]))).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data(content[end:]))


@pytest.mark.parametrize(
    ("dropped", "word"), [(EXPERT, EXPERT + "w1.weight and 2 more"), (".experts.", "experts.0.w1.weight")]
)
def test_dropped_experts(make_model, tmp_path: Path, dropped: str, word: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if dropped in name]:
            del tensors[name]

    folder, _, _ = make_model(change=change)
    refused(folder, tmp_path / "out", word, "the weights lack")


def test_a_renamed_key(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(change=rename(EXPERT + "w2.weight", EXPERT + "w2_proj.weight"))
    message = refused(folder, tmp_path / "out", "the weights lack " + EXPERT + "w2.weight")
    assert f"Did you mean '{EXPERT}w2_proj.weight'?" in message


def test_a_key_too_many(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(change=put("model.layers.0.self_attn.q_proj.bias", torch.zeros(4)))
    refused(folder, tmp_path / "out", "q_proj.bias", "which the model in")


@pytest.mark.parametrize("name", ["w1", "w3"])
def test_a_swapped_shape(make_model, tmp_path: Path, name: str) -> None:
    folder, _, _ = make_model(change=put(EXPERT + name + ".weight", torch.zeros(32, 48, dtype=torch.bfloat16)))
    refused(folder, tmp_path / "out", EXPERT + name + ".weight has shape [32, 48]", "[48, 32]")


@pytest.mark.parametrize("layout", ["v4", "v5"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf(make_model, tmp_path: Path, layout: str, bad: float) -> None:
    name = EXPERT + "w2.weight" if layout == "v4" else "model.layers.1.mlp.experts.down_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1 if layout == "v4" else 3 * 32 * 48 + 7] = bad

    folder, _, _ = make_model(layout=layout, change=change)
    refused(folder, tmp_path / "out", EXPERT + "w2.weight", "NaN or Inf")


@pytest.mark.parametrize("value", [1e30, -70000.0])
def test_too_large_for_fp16(make_model, tmp_path: Path, value: float) -> None:
    """It is the type that is too small, and the message says so, whoever casts."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][5] = value

    folder, _, tensors = make_model(change=change)
    held = re.escape(f"{tensors['model.norm.weight'][5].item():.5g}")
    message = rf"model\.norm\.weight: contains {held}, beyond the range of fp16 \(65504\); use --dtype bf16 or fp32"
    with pytest.raises(CheckpointError, match=message) as caught:
        import_checkpoint(str(folder), tmp_path / "out", dtype="fp16")
    assert "NaN" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    with pytest.raises(CheckpointError, match=message):
        export_checkpoint(checkpoint, tmp_path / "back", dtype="fp16")


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": 256},
        {"sliding_window": 4096},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},  # from max_position_embeddings on
        {"rope_parameters": {"rope_type": "yarn", "factor": 1.0, "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "default", "factor": 8.0, "rope_theta": 1e6}},
        {"hidden_act": "swish"},
    ],
)
def test_a_setting_without_effect_is_no_obstacle(make_model, tmp_path: Path, fields: dict[str, Any]) -> None:
    folder, config, tensors = make_model()
    (folder / "config.json").write_text(json.dumps(config | fields))
    back = export_checkpoint(import_checkpoint(str(folder), tmp_path / "megatron"), tmp_path / "back")
    written = json.loads((back / "config.json").read_text())
    assert written["sliding_window"] is None
    assert not written.get("rope_scaling")
    assert written.get("rope_parameters", {"rope_type": "default"})["rope_type"] == "default"
    assert written["rope_theta"] == 1e6
    assert torch.equal(load_file(back / "model.safetensors")["model.norm.weight"], tensors["model.norm.weight"])


def test_a_truncated_shard(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    refused(folder, tmp_path / "out", shard.name, "truncated")
    os.truncate(shard, 5)
    refused(folder, tmp_path / "out", shard.name, "truncated")


def test_truncated_while_it_is_read(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = make_model()
    from mixtral_recipes.importers.convert import hf_to_megatron

    def then_truncate(source: Path) -> Any:
        opened = opening(source)
        os.truncate(folder / "model.safetensors", 100_000)
        return opened

    opening = hf_to_megatron.open_model
    monkeypatch.setattr(hf_to_megatron, "open_model", then_truncate)
    refused(folder, tmp_path / "out", "model.safetensors", "truncated")


def test_an_index_naming_a_missing_file(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(shards=3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    refused(folder, tmp_path / "out", "model.safetensors.index.json", "names model-00003-of-00003.safetensors")


def test_a_single_file_beside_an_index_of_others(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model.safetensors")
    refused(
        folder, tmp_path / "out", "two sets of weights, model.safetensors and the files in model.safetensors.index.json"
    )


def test_an_index_that_disagrees(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(folder, tmp_path / "out", "names ../model")
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    refused(folder, tmp_path / "out", "index")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"sliding_window": 255}, "sliding_window=255"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "'llama'"),
        ({"architectures": ["MixtralForSequenceClassification"]}, "MixtralForSequenceClassification"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 1.5}}, "'yarn'"),
        ({"rope_scaling": {"type": "spiral", "factor": 1.0}}, "'spiral'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"transformers_weights": "ema.safetensors"}, "transformers_weights='ema.safetensors'"),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
    ],
)
def test_a_config_that_cannot_be_honoured(make_model, tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    folder, config, _ = make_model()
    (folder / "config.json").write_text(json.dumps(config | fields))
    refused(folder, tmp_path / "out", word)


def test_folders_that_are_no_model(make_model, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "an empty folder")
    refused(tmp_path / "nowhere", tmp_path / "out", "does not exist")
    folder, _, _ = make_model()
    (folder / "model.safetensors").unlink()
    refused(folder, tmp_path / "out", "no weights")
    (folder / "model.safetensors").write_bytes(b"\x10" * 64)
    refused(folder, tmp_path / "out", "model.safetensors")
    (folder / "config.json").write_text("{")
    refused(folder, tmp_path / "out", "not valid JSON")


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"dtype": "BF16", "shape": [32], "data_offsets": [-64, 0]}, "bytes -64 to 0"),
        ({"dtype": "BF16", "shape": [-4, -8], "data_offsets": [0, 64]}, "does not fit its shape"),
        ({"dtype": "BF16", "shape": [32], "data_offsets": [0, 62]}, "does not fit its shape"),
        ({"dtype": "BF16", "shape": "32", "data_offsets": [0, 64]}, "the way safetensors requires"),
        ({"dtype": "BF16", "shape": [32.0], "data_offsets": [0, 64]}, "the way safetensors requires"),
        ({"dtype": "BF16", "shape": [True, 32], "data_offsets": [0, 64]}, "the way safetensors requires"),
        ({"dtype": "BF16", "shape": [32], "data_offsets": [0, 64, 128]}, "the way safetensors requires"),
        ({"dtype": "BF16", "shape": [32], "data_offsets": [False, 64]}, "the way safetensors requires"),
        # Their product would be worked out for hours.
        ({"dtype": "BF16", "shape": [2**63 - 1] * 1_500_000, "data_offsets": [0, 64]}, "the way safetensors requires"),
        ({"dtype": ["BF16"], "shape": [32], "data_offsets": [0, 64]}, "has dtype"),
        ({"dtype": "BF16", "shape": [32]}, "the way safetensors requires"),
        ([0, 64], "the way safetensors requires"),
    ],
)
def test_a_header_that_lies(make_model, tmp_path: Path, entry: Any, word: str) -> None:
    folder, _, _ = make_model()
    rewrite(folder / "model.safetensors", lambda header: header | {"model.norm.weight": entry})
    refused(folder, tmp_path / "out", "model.norm.weight", word)
    rewrite(folder / "model.safetensors", lambda header: [])
    refused(folder, tmp_path / "out", "does not list tensors")


def test_two_tensors_in_one_place(make_model, tmp_path: Path) -> None:
    """A file whose header lays one expert over another: every key and shape is right, a tensor is missing."""
    folder, _, _ = make_model()
    rewrite(folder / "model.safetensors", lambda header: header | {EXPERT + "w1.weight": header[EXPERT + "w3.weight"]})
    refused(folder, tmp_path / "out", EXPERT, "overlap")


def moved(header: dict[str, Any]) -> dict[str, Any]:
    header.pop("__metadata__", None)
    return {name: entry | {"data_offsets": [n + 8 for n in entry["data_offsets"]]} for name, entry in header.items()}


@pytest.mark.parametrize(
    ("change", "data", "word"),
    [
        (dict, lambda data: data + b"more", "belong to no tensor"),
        (moved, lambda data: bytes(8) + data, "belong to no tensor"),
        (lambda header: header | {"__metadata__": {"format": 5}}, bytes, "__metadata__: format=5"),
    ],
)
def test_what_safetensors_refuses_is_refused_here(
    make_model, tmp_path: Path, change: Any, data: Any, word: str
) -> None:
    """What the import takes, `verify --against` must be able to read, and that asks the library."""
    folder, _, _ = make_model()
    rewrite(folder / "model.safetensors", change, data)
    refused(folder, tmp_path / "out", word)


class Payload:
    """What a hostile pickle looks like."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_that_carries_code(make_model, tmp_path: Path) -> None:
    folder, _, tensors = make_model(kind="bin")
    torch.save(tensors | {"lm_head.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    refused(folder, tmp_path / "out", "pytorch_model.bin", "could run code")
    assert not (tmp_path / "ran").exists()


def test_other_bin_files(make_model, tmp_path: Path) -> None:
    folder, _, tensors = make_model(kind="bin")
    file = folder / "pytorch_model.bin"
    os.truncate(file, file.stat().st_size // 2)
    refused(folder, tmp_path / "out", "truncated")
    torch.save(tensors | {"model.norm.weight": tensors["lm_head.weight"].t()}, file)
    refused(folder, tmp_path / "out", "model.norm.weight", "contiguous")
    torch.save([1], file)
    refused(folder, tmp_path / "out", "list")


def test_an_unsupported_dtype(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(change=put("model.norm.weight", torch.zeros(32, dtype=torch.float64)))
    refused(folder, tmp_path / "out", "model.norm.weight", "F64")


def test_mixed_dtypes_need_a_choice(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model(change=put("model.layers.1.input_layernorm.weight", torch.ones(32)))
    refused(folder, tmp_path / "out", "BF16 and F32", "--dtype")
    assert import_checkpoint(str(folder), tmp_path / "out", dtype="bf16").is_dir()


def test_an_output_that_exists(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    refused(folder, tmp_path / "out", "exists")
    with pytest.raises(CheckpointError, match=r"neither a mixtral-recipes checkpoint nor .* it has precious"):
        import_checkpoint(str(folder), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_overwrite_replaces_a_checkpoint(make_model, tmp_path: Path) -> None:
    first, _, _ = make_model("one", seed=1)
    second, _, _ = make_model("two", seed=2)
    import_checkpoint(str(first), tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_text()
    import_checkpoint(str(second), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "manifest.json").read_text() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "two"]


def test_too_little_room_is_foreseen(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = make_model()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    refused(folder, tmp_path / "out", "GB needed, ", error=EnvironmentProblem)


def test_a_disk_that_fills_up(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = make_model()
    calls = []

    def pwrite(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(folder, tmp_path / "out", "the disk is full", error=EnvironmentProblem)


def test_export_refuses(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    with pytest.raises(CheckpointError, match="exists"):
        export_checkpoint(checkpoint, folder)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        export_checkpoint(folder, tmp_path / "back")
    with pytest.raises(CheckpointError, match="5XB"):
        parse_size("5XB")
    with pytest.raises(CheckpointError, match="v6"):
        export_checkpoint(checkpoint, tmp_path / "back", layout="v6")  # pyright: ignore[reportArgumentType]
    (checkpoint / "context" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        export_checkpoint(checkpoint, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_export_refuses_a_damaged_training_checkpoint(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, "training")  # as training does: hashes of files, none of tensors
    export_checkpoint(checkpoint, tmp_path / "whole")
    file = checkpoint / "weights" / "__0_1.distcp"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="its SHA-256 is not the one in the manifest"):
        export_checkpoint(checkpoint, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("export", [export_checkpoint, export_nemo])
def test_export_refuses_another_configuration(make_model, tmp_path: Path, export: Callable[..., Path]) -> None:
    """As verify does, and a run that starts from it: only the weights' own hashes are compared while they are read."""
    folder, _, _ = make_model()
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    path = checkpoint / "context" / "config.json"
    path.write_text(path.read_text().replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 1'))
    with pytest.raises(CheckpointError, match=r"config\.json: damaged; its SHA-256 is not the one in the manifest"):
        export(checkpoint, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_export_refuses_a_damaged_checkpoint(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron")
    file = checkpoint / "weights" / "__0_1.distcp"
    data = bytearray(file.read_bytes())
    data[5000] ^= 1  # in the first item, past its header
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its hash in the manifest"):
        export_checkpoint(checkpoint, tmp_path / "back")
    with pytest.raises(CheckpointError, match="its SHA-256 is not the one in the manifest"):
        export_checkpoint(checkpoint, tmp_path / "back", dtype="fp32")
    os.truncate(file, len(data) // 2)
    with pytest.raises(CheckpointError, match="distcp"):
        export_checkpoint(checkpoint, tmp_path / "back")
    (checkpoint / "weights" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        export_checkpoint(checkpoint, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("layers", [50, 999, 1_000_000_000])
def test_counts_are_compared_before_names_are_made(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """config.json may describe any number of layers; nothing is made for each before the weights have as many."""
    folder, config, _ = make_model()
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))

    def never(dims: object, *, fused: bool) -> None:
        raise AssertionError("names were made")

    monkeypatch.setattr(source_module, "hf_tensors", never)
    refused(folder, tmp_path / "out", str(layers), "at most 1000" if layers > 1000 else "too few")


def test_a_header_that_names_a_tensor_twice(tmp_path: Path) -> None:
    entry = json.dumps({"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]})
    header = f'{{"w": {entry}, "w": {entry}}}'.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="'w' appears twice"):
        read_header(path)


@pytest.mark.parametrize("weight_map", [None, [], "x", {"w": 1}, {"w": None, "v": "model.safetensors"}])
def test_an_index_of_other_things(make_model, tmp_path: Path, weight_map: object) -> None:
    folder, _, _ = make_model(shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, tmp_path / "out", "not an index of weight files")
