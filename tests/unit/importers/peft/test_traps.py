"""What others got wrong about adapters of fused experts, one test each (numbers against peft: tests/parity)."""

import json
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.errors import CheckpointError, MixtralRecipesWarning
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.peft.export import export_adapter
from mixtral_recipes.importers.peft.source import read_settings
from mixtral_recipes.importers.resolve import import_any
from mixtral_recipes.settings.peft import LoRA
from tests.adapter_folder import make_adapter

FACTORS = ".mlp.experts.lora_{}.weight"  # of down_proj, in the v5 layout


def base_of_width(make_model, tmp_path: Path, ffn: int) -> Path:
    folder, _, _ = make_model(intermediate_size=ffn)
    return import_checkpoint(str(folder), tmp_path / "base", progress=False)


def as_pefts(folder: Path) -> Path:
    """An export as if peft had written it: without our record of what is in it."""
    (folder / "lineage.json").unlink()
    return folder


@pytest.mark.parametrize("layout", ["v4", "v5"])
@pytest.mark.parametrize("ffn", [32, 8, 4], ids=["square", "narrow", "narrower than the rank"])
def test_no_shape_is_guessed_from(make_model, tmp_path: Path, ffn: int, layout: str) -> None:
    """Square experts, and such as are narrower than the rank, come back as they went."""
    base = base_of_width(make_model, tmp_path, ffn)
    first = make_adapter(base, LoRA(dim=6, alpha=12), tmp_path / "first")
    one = export_adapter(first, tmp_path / "one", layout=layout)
    again = import_any(str(one), tmp_path / "again", base=str(base))
    two = export_adapter(again, tmp_path / "two", layout=layout)
    assert (one / "adapter_model.safetensors").read_bytes() == (two / "adapter_model.safetensors").read_bytes()
    other = export_adapter(again, tmp_path / "other", layout="v5" if layout == "v4" else "v4")
    assert (other / "adapter_model.safetensors").read_bytes() == (
        export_adapter(first, tmp_path / "first-other", layout="v5" if layout == "v4" else "v4")
        / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "scheme",
    [
        LoRA(dim=2, layers="1", modules_to_save=["output_layer"]),
        LoRA(dim=2, experts={"0": [1], "1": [2, 7]}),
        LoRA(dim=2, target_modules=["linear_fc2"], layers="0", experts=[3]),
        LoRA(dim=2, target_modules="attention", layers=[1]),
    ],
)
@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_a_part_of_the_model_comes_back_as_a_part(make_model, tmp_path: Path, layout: str, scheme: LoRA) -> None:
    base = base_of_width(make_model, tmp_path, 48)
    first = make_adapter(base, scheme, tmp_path / "first")
    one = export_adapter(first, tmp_path / "one", layout=layout)
    again = import_any(str(one), tmp_path / "again", base=str(base))
    taken = json.loads((again / "context" / "run.json").read_text())["peft"]
    assert taken["modules_to_save"] == scheme.modules_to_save
    came_back = LoRA(target_modules=taken["target_modules"], layers=taken["layers"], experts=taken["experts"])
    for layer in range(2):
        for name in (
            f"decoder.layers.{layer}.self_attention.linear_qkv",
            *(f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2" for expert in range(8)),
        ):
            assert came_back.adapts(name) == scheme.adapts(name), name
    two = export_adapter(again, tmp_path / "two", layout=layout)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert read_manifest(again)["kind"] == "adapter"


def test_inputs_and_outputs_swapped_as_before_peft_0_19(make_model, tmp_path: Path) -> None:
    base = base_of_width(make_model, tmp_path, 48)
    folder = export_adapter(make_adapter(base, LoRA(dim=2), tmp_path / "first"), tmp_path / "peft", layout="v5")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for a in [key for key in tensors if key.endswith(FACTORS.format("A"))]:
        b = a.replace("lora_A", "lora_B")
        tensors[a], tensors[b] = tensors[b].t().contiguous(), tensors[a].t().contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"down_proj has lora_A \[16, 32\] .* \[8 x r, 48\] and \[32, 8"):
        import_any(str(folder), tmp_path / "again", base=str(base))


def test_dropout_is_left_behind_where_experts_are_adapted(make_model, tmp_path: Path) -> None:
    """peft refuses it on parameters, which experts are under transformers 5 whatever the file's layout."""
    base = base_of_width(make_model, tmp_path, 48)
    for targets, expected in (("all-linear", 0.0), ("attention", 0.1)):
        made = make_adapter(base, LoRA(dim=2, dropout=0.1, target_modules=targets), tmp_path / targets)
        for layout in ("v4", "v5"):
            folder = export_adapter(made, tmp_path / f"{targets}-{layout}", layout=layout)
            assert json.loads((folder / "adapter_config.json").read_text())["lora_dropout"] == expected


def test_a_merged_folder_generates_as_its_base_does(make_model, tmp_path: Path) -> None:
    base = base_of_width(make_model, tmp_path, 48)
    made = make_adapter(base, LoRA(dim=2), tmp_path / "adapter")
    merged = export_checkpoint(made, tmp_path / "merged", no_check=True)
    assert json.loads((merged / "generation_config.json").read_text()) == {"eos_token_id": 2}


def test_no_adapter_on_the_router_leaves_the_house(make_model, tmp_path: Path) -> None:
    base = base_of_width(make_model, tmp_path, 48)
    made = make_adapter(base, LoRA(dim=2), tmp_path / "adapter")
    for layout in ("v4", "v5"):
        folder = export_adapter(made, tmp_path / layout, layout=layout)
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["target_modules"] != "all-linear"
        assert not [name for name in load_file(folder / "adapter_model.safetensors") if ".gate." in name]
        assert not {"gate", "all-linear"} & set(settings["target_modules"])


def test_another_kind_of_adapter_is_named(tmp_path: Path) -> None:
    mlx = '{"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}}'
    (tmp_path / "adapter_config.json").write_text(mlx)
    with pytest.raises(CheckpointError, match=r"an MLX adapter, and only peft's .* lora_alpha=rank \* scale"):
        read_settings(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "target_modules": ["k_proj"]}')
    with pytest.raises(CheckpointError, match="peft_type='IA3' is not supported"):
        read_settings(tmp_path)


def test_its_own_tokenizer_is_left_behind_by_name(make_model, tmp_path: Path) -> None:
    base = base_of_width(make_model, tmp_path, 48)
    folder = export_adapter(make_adapter(base, LoRA(dim=2), tmp_path / "adapter"), tmp_path / "peft")
    (folder / "tokenizer.json").write_text("{}")
    made = import_any(str(folder), tmp_path / "again", base=str(base))
    assert "tokenizer.json" in read_manifest(made)["left_behind"]


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("layers_to_transform", [0], "model.layers.1.self_attn.k_proj"),
        ("layers_to_transform", 0, "model.layers.1.self_attn.k_proj"),
        ("exclude_modules", ["k_proj"], "model.layers.0.self_attn.k_proj"),
        ("exclude_modules", r"model\.layers\.1.*v_proj", "model.layers.1.self_attn.v_proj"),
        ("target_modules", ["q_proj", "k_proj", "v_proj"], "model.layers.0.self_attn.o_proj"),
        ("layers_to_transform", [0, 1], None),
        ("layers_to_transform", None, None),
        ("exclude_modules", ["lm_head"], None),
        ("target_modules", "all-linear", None),
    ],
)
def test_settings_that_leave_out_what_has_tensors_are_told(
    make_model, tmp_path: Path, setting: str, value: object, told: str | None
) -> None:
    base = base_of_width(make_model, tmp_path, 48)
    adapter = make_adapter(base, LoRA(dim=2, target_modules="attention"), tmp_path / "first")
    one = as_pefts(export_adapter(adapter, tmp_path / "one"))
    path = one / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MixtralRecipesWarning)
        import_any(str(one), tmp_path / "again", base=str(base))
    texts = [str(each.message) for each in caught if each.category is MixtralRecipesWarning]
    assert len(texts) == bool(told), texts
    assert all(f"{setting}=" in text and f"leaves out {told}" in text for text in texts)


def test_tensors_that_are_missing_or_there_twice(make_model, tmp_path: Path) -> None:
    base = base_of_width(make_model, tmp_path, 48)
    scheme = LoRA(dim=2, target_modules="attention")
    folder = as_pefts(export_adapter(make_adapter(base, scheme, tmp_path / "first"), tmp_path / "one"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    save_file(tensors | {key.replace("A.weight", "A.default.weight"): tensors[key] + 1}, file)
    with pytest.raises(CheckpointError, match="appears twice, under two spellings of its name"):
        import_any(str(folder), tmp_path / "twice", base=str(base))
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1." not in name}, file)
    with pytest.warns(
        MixtralRecipesWarning, match=r"includes model\.layers\.1\.self_attn\.\w_proj, .* no tensor for it \(4 such"
    ):
        import_any(str(folder), tmp_path / "part", base=str(base))
