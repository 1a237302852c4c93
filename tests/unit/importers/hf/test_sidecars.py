"""What travels beside the weights: all the model refers to, nothing else, and nothing from outside its folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.adapter_checkpoint import write_adapter_checkpoint
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.convert.megatron_to_nemo import export_nemo
from mixtral_recipes.importers.hf import sidecars
from mixtral_recipes.settings.peft import LoRA

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 493443\n"  # noqa: E501
FILES = {
    "additional_chat_templates/tools.jinja": "{{ messages }}",
    "chat_template.jinja": "{{ messages[0].content }}",
    "tekken.json": '{"config": {}}',
    "tokenizer.model": "\x0a\x0b",
    "LICENSE": "Apache 2.0",
    "NOTICE.txt": "notice",
    "modeling_ours.py": "from .layers_ours import Layer\nimport torch\n",
    "layers_ours.py": "from . import what\nfrom .deep_ours import x\n",
    "deep_ours.py": "x = 1\n",
    "tokenization_ours.py": "",
    "pipeline_ours.py": "",
}
LEFT = {
    "train.py": "",
    "README.md": "# model",
    "pytorch_model.bin": "other weights",
    "logs/a.txt": "",
    ".gitattributes": "x",
}


@pytest.fixture
def model(make_model) -> Path:
    """A model folder with everything that may travel, and more."""
    folder, config, _ = make_model()
    for name, text in (FILES | LEFT).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    code = {
        "auto_map": {"AutoModelForCausalLM": "modeling_ours.Model", "AutoConfig": "org/other--configuration.Config"},
        "custom_pipelines": {"ours": {"impl": "pipeline_ours.Pipeline", "pt": ["AutoModelForCausalLM"]}},
    }
    (folder / "config.json").write_text(json.dumps(config | code))
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_ours.T", null]}}')
    return folder


def names_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_the_model_refers_to_travels_there_and_back(model: Path, tmp_path: Path) -> None:
    expected = {*FILES, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    checkpoint = import_checkpoint(str(model), tmp_path / "megatron")
    assert names_below(checkpoint / "context") == expected
    back = export_checkpoint(checkpoint, tmp_path / "back")
    ours = {"README.md", "lineage.json", "model.safetensors"}
    assert names_below(back) - ours == expected
    for name in expected:
        assert (back / name).read_bytes() == (model / name).read_bytes(), name


def test_what_is_left_behind_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["import", str(model), "--output", str(tmp_path / "megatron"), "--json"]) == 0
    shown = capsys.readouterr()
    left = ["README.md", "logs/", "notes.txt", "pytorch_model.bin", "train.py"]
    assert f"refers to them: {', '.join(left)}." in shown.err
    assert json.loads(shown.out.splitlines()[-1])["left_behind"] == left
    assert read_manifest(tmp_path / "megatron")["left_behind"] == left
    again = import_checkpoint(str(export_checkpoint(tmp_path / "megatron", tmp_path / "back")), tmp_path / "again")
    assert read_manifest(again)["left_behind"] == ["README.md"], "an export's lineage is read"


@pytest.mark.parametrize("missing", ["modeling_ours.py", "tokenization_ours.py", "pipeline_ours.py"])
def test_no_configuration_names_code_that_is_not_there(model: Path, tmp_path: Path, missing: str) -> None:
    (model / missing).unlink()
    context = import_checkpoint(str(model), tmp_path / "megatron") / "context"
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((context / name).read_text())
        assert sidecars.code_named_in(config) <= names_below(context)
    assert "org/other" in (context / "config.json").read_text(), "what does not depend on the file stays"


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "LICENSE",
     "generation_config.json", "additional_chat_templates/tools.jinja", "modeling_ours.py", "model.safetensors"],
)  # fmt: skip
def test_a_pointer_in_place_of_a_file(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer of 131 bytes.*git lfs pull"):
        import_checkpoint(str(model), tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(("shards", "kind", "name"), [
    (1, "bin", "pytorch_model.bin"),
    (2, "st", "model.safetensors.index.json"),
    (2, "st", "model-00002-of-00002.safetensors"),
    (2, "bin", "pytorch_model-00001-of-00002.bin"),
])  # fmt: skip
def test_a_pointer_in_place_of_weights(make_model, tmp_path: Path, shards: int, kind: str, name: str) -> None:
    folder, _, _ = make_model(shards=shards, kind=kind)
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer"):
        import_checkpoint(str(folder), tmp_path / "megatron")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "<!doctype html>"),
        ("tokenizer.json", ""),
        ("special_tokens_map.json", "[]"),
        ("tekken.json", "{"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"a": 1, "a": 2}}'),
    ],
)
def test_a_file_that_is_not_what_its_name_says(model: Path, tmp_path: Path, name: str, text: str) -> None:
    (model / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name}: not"):
        import_checkpoint(str(model), tmp_path / "megatron")


@pytest.mark.parametrize("value", ["2", [True], {"a": 1}, -1, 1.5])
def test_a_generation_config_of_other_kinds(model: Path, tmp_path: Path, value: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id.* it must be"):
        import_checkpoint(str(model), tmp_path / "megatron")


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "config.json"])
def test_a_pipe_in_place_of_a_file(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(CheckpointError, match=rf"{name}( is a pipe or a device, not a file| beside them)"):
        import_checkpoint(str(model), tmp_path / "megatron")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "LICENSE", "additional_chat_templates/tools.jinja", "layers_ours.py"]
)
def test_a_link_out_of_the_model_does_not_travel(model: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "id_rsa"
    secret.write_text('{"private": "s3cr3t"}')
    (model / name).unlink()
    (model / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*id_rsa, outside the model"):
        import_checkpoint(str(model), tmp_path / "megatron")


def test_a_link_of_a_whole_folder_does_not_travel_either(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("s3cr3t")
    for path in (model / "additional_chat_templates").iterdir():
        path.unlink()
    (model / "additional_chat_templates").rmdir()
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"x\.jinja is a link to"):
        import_checkpoint(str(model), tmp_path / "megatron")


def test_links_inside_the_model_and_those_of_the_hubs_cache_are_followed(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model("models--org--name/blobs")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (snapshot / "added_tokens.json").symlink_to("generation_config.json")
    context = import_checkpoint(str(snapshot), tmp_path / "megatron") / "context"
    assert "added_tokens.json" in names_below(context)
    assert not any(path.is_symlink() for path in context.iterdir())


@pytest.mark.parametrize(
    ("fields", "written"),
    [
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, {"dtype": "float16", "torch_dtype": "float16"}),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, {"dtype": "float16", "torch_dtype": "float16"}),
        ({}, {"torch_dtype": "float16"}),
    ],
)
@pytest.mark.parametrize("at", ["import", "export"])
def test_both_spellings_of_the_type_change_together(
    make_model, tmp_path: Path, fields: dict[str, Any], written: dict[str, Any], at: str
) -> None:
    folder, config, _ = make_model()
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config | fields))
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron", dtype="fp16" if at == "import" else None)
    back = export_checkpoint(checkpoint, tmp_path / "back", dtype="fp16")
    found = json.loads((back / "config.json").read_text())
    assert {name: found[name] for name in ("dtype", "torch_dtype") if name in found} == written


def test_a_pointer_in_place_of_mistrals_parameters(tmp_path: Path) -> None:
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"params\.json is a Git LFS pointer"):
        import_checkpoint(str(tmp_path), tmp_path / "megatron")


def test_a_link_in_a_checkpoint_takes_nothing_along(make_model, tmp_path: Path) -> None:
    """A checkpoint from elsewhere whose tokenizer is a link to a file of this machine's owner."""
    folder, _, _ = make_model()
    base = import_checkpoint(str(folder), tmp_path / "base", progress=False)
    (tmp_path / "secret").write_text('{"a": "secret"}')
    (base / "context" / "tokenizer.json").unlink()
    (base / "context" / "tokenizer.json").symlink_to(tmp_path / "secret")
    tensors = {"decoder.final_layernorm.adapter": torch.zeros(2)}

    def write_adapter() -> None:
        write_adapter_checkpoint(tmp_path / "out", LoRA(), tensors, base=base, sources=[], origin={})

    for make in (
        write_adapter,
        lambda: export_checkpoint(base, tmp_path / "out", progress=False),
        lambda: export_nemo(base, tmp_path / "out", progress=False),
    ):
        with pytest.raises(
            CheckpointError, match=r"is a link to .*secret, outside|tokenizer.json: is a link; checkpoints must not"
        ):
            make()
        assert not (tmp_path / "out").exists()
