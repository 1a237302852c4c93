"""Adapters that peft trained are taken exactly: merged, they compute what peft computes with them, fp32."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.peft.export import export_adapter
from mixtral_recipes.importers.peft.source import unknown
from mixtral_recipes.importers.resolve import import_any
from mixtral_recipes.system.files import sha256
from tests.distributed.harness import launch
from tests.distributed.small_run import relative_error
from tests.parity.hf_mixtral import Folders, hf_model, tokens
from tests.parity.test_peft_export import merged_logits, peft_logits
from tests.unit.importers.hf.test_bin_files import in_big_endian, zip_again

TOLERANCE = 1e-5  # of the largest logit; fp32, four layers
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "q and v": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "v5": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": FUSED},
    "v5 down": {"r": 2, "lora_alpha": 8, "target_modules": [], "target_parameters": FUSED[1:]},
    "v4": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "w1", "w2", "w3"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"q_proj": 2, r".*layers\.1\.self_attn\.o_proj": 6}, "alpha_pattern": {"v_proj": 3},
    },
    "some layers": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        "layers_to_transform": [1, 3], "layers_pattern": "layers",
    },
    "whole": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_dora": True},
}  # fmt: skip


def trained_by_peft(folders: Folders, settings: dict[str, Any], output: Path) -> Tensor:
    """Train a few steps with peft, save, and return the logits."""
    from peft import LoraConfig, get_peft_model

    base: Any = hf_model(folders)
    torch.manual_seed(1)
    model: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=20.0)
    for _ in range(3):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = str(folders.hf)
    model.save_pretrained(output)
    with torch.no_grad():
        return model.eval()(tokens()).logits


@pytest.mark.parametrize("case", CASES)
def test_what_peft_trained(folders: Folders, tmp_path: Path, case: str) -> None:
    expected = launch(1, trained_by_peft, folders, CASES[case], tmp_path / "peft")[0]
    base = launch(1, merged_logits, folders.hf)[0]
    assert relative_error(base, expected) > 1e-2  # it learned something
    assert not unknown(json.loads((tmp_path / "peft" / "adapter_config.json").read_text()))  # of this peft's settings
    checkpoint = import_any(str(tmp_path / "peft"), tmp_path / "adapter", base=str(folders.megatron))
    merged = export_checkpoint(checkpoint, tmp_path / "merged")
    assert relative_error(launch(1, merged_logits, merged)[0], expected) < TOLERANCE


@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_there_and_back_and_there(folders: Folders, tmp_path: Path, layout: str) -> None:
    """What we export, we import to the same bytes, at the same rank."""
    launch(1, trained_by_peft, folders, CASES["v5"], tmp_path / "peft")
    first = import_any(str(tmp_path / "peft"), tmp_path / "first", base=str(folders.megatron))
    one = export_adapter(first, tmp_path / "one", layout=layout)
    for made in (first, one):
        assert run(["lineage", str(made)]) == 0
    again = import_any(str(one), tmp_path / "again", base=str(folders.megatron))
    two = export_adapter(again, tmp_path / "two", layout=layout)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_the_base_is_the_one_it_names(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    expected = launch(1, trained_by_peft, folders, CASES["q and v"], tmp_path / "peft")[0]
    checkpoint = import_any(str(tmp_path / "peft"))
    assert import_any(str(tmp_path / "peft")) == checkpoint
    assert (
        relative_error(launch(1, peft_logits, folders, export_adapter(checkpoint, tmp_path / "out"))[0], expected)
        < 1e-5
    )


def test_a_bin_file_is_taken_as_data(folders: Folders, tmp_path: Path) -> None:
    """What peft wrote before safetensors gives the same weights; one that would run something is refused."""
    launch(1, trained_by_peft, folders, CASES["q and v"], tmp_path / "peft")

    def taken(output: str) -> dict[str, Any]:
        checkpoint = import_any(str(tmp_path / "peft"), tmp_path / output, base=str(folders.megatron))
        return {name: file for name, file in read_manifest(checkpoint)["files"].items() if name.startswith("weights/")}

    file, old = (tmp_path / "peft" / f"adapter_model.{kind}" for kind in ("safetensors", "bin"))
    tensors = load_file(file)
    torch.save(tensors, old)
    expected = taken("one")
    source = lineage.read(tmp_path / "one").parent("source")
    assert source is not None
    assert source.record.identity.weights == sha256(file)  # the one that was read
    file.unlink()
    assert taken("two") == expected
    torch.save(tensors | {"x": Path}, old)
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: refused"):
        taken("three")
    torch.save(tensors, old)
    zip_again(old, in_big_endian)  # torch's own reader ends the process
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: refused, .*big-endian"):
        taken("three")
    old.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a Git LFS pointer"):
        taken("three")
    old.write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: truncated"):
        taken("three")


def damaged(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, but the adapter has no weights"),
        (
            {"modules_to_save": ["classifier"]},
            "classifier, but only embed_tokens and lm_head are supported; merge",
        ),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's weights"),
        ({"r": 8}, "has rank 4, but adapter_config.json says 8"),
        ({"r": True}, "r=True is not allowed; it must be a whole number"),
        ({"lora_alpha": float("nan")}, r"adapter_config\.json: .*NaN is not a finite number"),
        ({"use_newest_thing": 2}, "use_newest_thing='2' is not a known setting of LoRA"),
        ({"use_dora": True}, "use_dora=True and the tensors of .* disagree"),
    ],
)
def test_settings_refused(folders: Folders, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    launch(1, trained_by_peft, folders, CASES["q and v"], tmp_path / "peft")
    damaged(tmp_path / "peft", **settings)
    with pytest.raises(CheckpointError, match=message):
        import_any(str(tmp_path / "peft"), tmp_path / "adapter", base=str(folders.megatron))
    assert not (tmp_path / "adapter").exists()


def test_tensors_that_cannot_be_taken(folders: Folders, tmp_path: Path) -> None:
    """The router (peft's all-linear adapts it), whole weights, a factor without its other, values that are none."""
    launch(1, trained_by_peft, folders, CASES["q and v"], tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    whole = load_file(file)
    at = "base_model.model.model.layers.0."
    gate = f"{at}block_sparse_moe.gate"
    router = {f"{gate}.lora_A.weight": torch.zeros(4, 32), f"{gate}.lora_B.weight": torch.zeros(8, 4)}
    wrong = {
        "adapts the router": whole | router,
        "adapts a layer (lm_head)": whole | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
        "adapts a layer (embed_tokens)": whole | {f"{at[:-9]}embed_tokens.lora_embedding_A": torch.zeros(4, 101)},
        "is not a LoRA factor": whole | {"base_model.model.lm_head.weight": torch.zeros(101, 32)},
        "has only one of": {k: v for k, v in whole.items() if k != f"{at}self_attn.q_proj.lora_B.weight"},
        "not finite": whole | {f"{at}self_attn.q_proj.lora_A.weight": torch.full((4, 32), torch.nan)},
        "another base model": whole | {f"{at}self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)},
        "has no tensors": {},
    }  # fmt: skip
    for message, tensors in wrong.items():
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            import_any(str(tmp_path / "peft"), tmp_path / "adapter", base=str(folders.megatron))
