"""`llm.import_ckpt` and `llm.export_ckpt`, with NeMo's arguments."""

from pathlib import Path

import pytest

from mixtral_recipes.api import export_ckpt, import_ckpt
from mixtral_recipes.errors import CheckpointError, RecipeError
from mixtral_recipes.models.config import MixtralConfig, MixtralModel
from mixtral_recipes.settings.objects import as_configs


def model(**fields: int) -> MixtralModel:
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2}
    return MixtralModel(MixtralConfig(**sizes | fields))


def test_there_and_back(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    checkpoint = import_ckpt(model(), str(folder), tmp_path / "megatron")
    back = export_ckpt(checkpoint, "hf")
    assert back == tmp_path / "megatron-hf"
    assert (back / "model.safetensors").is_file()


def test_paths_may_begin_at_home(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert import_ckpt(model(), Path("~/hf"), "~/megatron") == tmp_path / "megatron"
    assert export_ckpt("~/megatron", output_path=Path("~/back")) == tmp_path / "back"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a.gguf", r"a\.gguf is a GGUF model .* pass the model it was made from"),
        ("run/checkpoints/one/weights/x", r"run/checkpoints holds no intact checkpoint"),
        ("nothing here", r"nothing does not exist; pass a checkpoint folder or nemo://ID"),
    ],
)
def test_what_cannot_be_exported_is_named(entry: str, message: str, tmp_path: Path) -> None:
    place = tmp_path / entry.partition("/")[0]
    if entry != "nothing here":
        (tmp_path / entry).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / entry).touch()
    with pytest.raises(CheckpointError, match=message):
        export_ckpt(place if entry != "nothing here" else tmp_path / "nothing")


def test_another_model_is_refused_before_anything_is_written(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    with pytest.raises(RecipeError, match=r"model\.config\.num_layers=3, but the checkpoint .*hf has 2"):
        import_ckpt(model(num_layers=3), str(folder), tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_model_may_be_a_config_as_a_recipe_s_is(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    for number, given in enumerate((as_configs(model()), MixtralModel(as_configs(model().config)))):
        assert import_ckpt(given, folder, tmp_path / f"{number}").is_dir()
    for wrong in ("mixtral_8x7b", model().config):
        with pytest.raises(RecipeError, match=r"model=.* must be a MixtralModel"):
            import_ckpt(wrong, folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


def test_other_targets_and_options_without_effect_are_refused(make_model, tmp_path: Path) -> None:
    folder, _, _ = make_model()
    checkpoint = import_ckpt(model(), folder, tmp_path / "megatron")
    with pytest.raises(CheckpointError, match="target onnx is not a known"):
        export_ckpt(checkpoint, "onnx")
    with pytest.raises(CheckpointError, match="max_shard_size has no effect with target peft"):
        export_ckpt(checkpoint, "hf-peft", max_shard_size="5GB")
