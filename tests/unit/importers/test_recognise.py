"""Folders are named for what they are, by every command that takes one."""

import json
from pathlib import Path

import pytest

from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.executors.runs.checkpoints import checkpoint_folder, model_checkpoint
from mixtral_recipes.importers import locations
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.recognise import Form, recognise, required
from mixtral_recipes.importers.resolve import check_source, resolve
from mixtral_recipes.system.home import models_home

# Form -> the files that make a folder one.
FOLDERS: dict[Form, tuple[str, ...]] = {
    Form.UNFINISHED: ("weights/.metadata", "context/config.json"),
    Form.RUN: ("checkpoints/step=1/manifest.json", "recipe.yaml"),
    Form.HF: ("config.json", "model.safetensors", "consolidated.safetensors", "params.json"),
    Form.MISTRAL: ("params.json", "consolidated.00.pth", "tokenizer.model", "config.json"),
    Form.NEMO: ("weights/.metadata", "weights/common.pt", "context/io.json", "context/model.yaml"),
    Form.NEMO_ADAPTER: ("weights/.metadata", "weights/adapter_metadata.json", "context/io.json"),
    Form.NEMO_1: ("model_config.yaml", "model_weights/.metadata"),
    Form.PEFT: ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
    Form.MISTRAL_LORA: ("lora.safetensors", "params.json"),
    Form.GGUF: ("mixtral.Q4_K_M.gguf",),
    Form.MEGATRON_LEGACY: ("latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00/model_optim_rng.pt"),
    Form.MEGATRON: ("latest_checkpointed_iteration.txt", "iter_0000010/.metadata"),
    Form.ZARR: ("metadata.json", "decoder.weight/.zarray"),
    Form.DCP: (".metadata", "__0_0.distcp"),
    Form.DEEPSPEED: ("zero_to_fp32.py", "latest", "global_step10/mp_rank_00_model_states.pt"),
    Form.WEIGHT_FILES: ("model.safetensors",),
    Form.TOKENIZER: ("tokenizer.json", "tokenizer_config.json"),
    Form.COLLECTION: ("one/config.json", "two/params.json"),
    Form.EMPTY: (),
    Form.UNKNOWN: ("notes.txt", "a/b"),
}


def make(folder: Path, files: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


@pytest.mark.parametrize("form", list(FOLDERS), ids=lambda form: form.name)
def test_every_form_is_named(tmp_path: Path, form: Form) -> None:
    folder = make(tmp_path / "folder", FOLDERS[form])
    found = recognise(folder)
    assert (found.form, found.folder) == (form, folder)


@pytest.mark.parametrize(
    "form", [f for f in FOLDERS if f not in (Form.HF, Form.MISTRAL, Form.NEMO, Form.MEGATRON)], ids=lambda f: f.name
)
def test_import_names_what_it_refuses(tmp_path: Path, form: Form, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "folder", FOLDERS[form])
    if form in (Form.NEMO_ADAPTER, Form.PEFT):
        pytest.skip("is imported; its own tests say how")
    assert run(["import", str(folder), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{folder} is {form} (" in message
    assert "no config.json" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["verify"], ["export"]])
@pytest.mark.parametrize("form", [f for f in FOLDERS if f is not Form.RUN], ids=lambda form: form.name)
def test_export_and_verify_name_what_they_refuse(
    tmp_path: Path, form: Form, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path / "folder", FOLDERS[form])
    words = [*command, str(folder), *([str(tmp_path / "out")] if command == ["export"] else [])]
    assert run(words) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"is {form} (" in message
    if form in (Form.HF, Form.MISTRAL):
        assert f"mixtral-recipes import {folder}" in message


def test_a_quantised_base_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lies in the form of one, with a manifest, and without a config.json."""
    folder = make(tmp_path / "folder", ("weights/.metadata",))
    write_manifest(folder, "quantized")
    for words in (["import", "--output", str(tmp_path / "out")], ["verify"], ["export", str(tmp_path / "out")]):
        assert run([words[0], str(folder), *words[1:]]) == 2
        assert f"{folder} is {Form.QUANTIZED} (manifest.json), not" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="pass the model it was made from"):
        check_source(str(folder))


def test_restore_from_names_what_it_refuses(tmp_path: Path) -> None:
    for form in (Form.GGUF, Form.MEGATRON_LEGACY, Form.DCP):
        folder = make(tmp_path / form.name, FOLDERS[form])
        for taken in (resolve, check_source):
            with pytest.raises(CheckpointError, match=f"is {form} "):
                taken(str(folder))


def test_a_start_is_refused_before_a_job_is(make_model, tmp_path: Path) -> None:
    """And nothing is imported for it."""
    folder, _, _ = make_model()
    for fine in (str(folder), f"hf://{folder}", "hf://org/name", "nemo://org/name", "embedded://mixtral_tiny"):
        check_source(fine)
    (tmp_path / "adapter").mkdir()
    settings = tmp_path / "adapter" / "adapter_config.json"
    for found, message in (
        (
            {"peft_type": "IA3", "r": 8, "lora_alpha": 8, "base_model_name_or_path": "org/name"},
            "peft_type='IA3' is not supported",
        ),
        ({"peft_type": "LORA", "r": 8, "lora_alpha": 8}, "names no base model"),
    ):
        settings.write_text(json.dumps(found))
        with pytest.raises(CheckpointError, match=message):
            check_source(str(settings.parent))
    for missing in (str(tmp_path / "nowhere"), "s3://bucket/x"):
        with pytest.raises(CheckpointError):
            check_source(missing)
    assert not list(models_home().glob("*/*"))


def test_our_own_checkpoint_and_the_folders_in_it(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    checkpoint = import_checkpoint(str(folder), tmp_path / "out", progress=False)
    for path in (checkpoint, checkpoint / "weights", checkpoint / "context"):
        assert recognise(path).form is Form.CHECKPOINT
        assert recognise(path).folder == checkpoint
    assert locations.checkpoint(str(checkpoint / "weights")) == checkpoint
    with pytest.raises(CheckpointError, match="already imported"):
        import_checkpoint(str(checkpoint), tmp_path / "again", progress=False)


def test_files_and_the_hub_cache(tmp_path: Path) -> None:
    gguf = tmp_path / "mixtral.gguf"
    gguf.write_bytes(b"GGUF")
    assert recognise(gguf).form is Form.GGUF
    for taken in (checkpoint_folder, model_checkpoint):  # export and verify; generate, chat and --compare
        with pytest.raises(CheckpointError, match=r"mixtral\.gguf is a GGUF model .* pass the model it was made from"):
            taken(str(gguf))
    (tmp_path / "old.nemo").write_bytes(b"tar")
    assert recognise(tmp_path / "old.nemo").form is Form.NEMO_1
    cache = make(tmp_path / "models--org--name", ("snapshots/abc/config.json", "refs/main"))
    assert recognise(cache).form is Form.HUB_CACHE
    with pytest.raises(CheckpointError, match="hf://org/name"):
        required(cache, Form.HF)
    with pytest.raises(CheckpointError, match="does not exist"):
        recognise(tmp_path / "nowhere")


def test_a_backend_that_metadata_names(tmp_path: Path) -> None:
    folder = make(tmp_path / "zarr", ("notes.txt",))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    assert recognise(folder).form is Form.ZARR
    for text in ("[]", "[" * 100_000):
        (folder / "metadata.json").write_text(text)
        assert recognise(folder).form is Form.UNKNOWN


@pytest.mark.parametrize(
    ("files", "form"),
    [
        (("config.json", "mixtral.Q4_K_M.gguf"), Form.GGUF),
        (("config.json", "zero_to_fp32.py", "global_step5/zero_pp_rank_0_optim_states.pt"), Form.DEEPSPEED),
        (("config.json", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"), Form.DCP),
        (("config.json", "model.safetensors", "zero_to_fp32.py"), Form.HF),
        (("checkpoint-500/adapter_config.json", "checkpoint-1000/adapter_config.json"), Form.COLLECTION),
        (("first/checkpoints/latest", "second/checkpoints/latest"), Form.COLLECTION),
    ],
)
def test_what_trainers_and_converters_leave(tmp_path: Path, files: tuple[str, ...], form: Form) -> None:
    assert recognise(make(tmp_path / "x", files)).form is form
