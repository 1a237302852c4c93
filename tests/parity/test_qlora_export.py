"""What a QLoRA adapter leaves as: merged into the original weights, into those it was trained over, or alone; fp32."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixtral_recipes.checkpoints.lineage import record as lineage
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.peft.export import export_adapter
from mixtral_recipes.inference.model import InferenceModel, join
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.settings.peft import LoRA, QLoRA
from tests.distributed.harness import launch
from tests.distributed.small_run import fill, relative_error
from tests.parity.hf_mixtral import Folders, hf_model, our_logits, our_run, save_adapters, tokens

TOLERANCE = 2e-5  # of the largest logit; fp32, four layers: seen 1.1e-5


def adapted(folders: Folders, peft: LoRA, saved: Path) -> tuple[Path, Tensor]:
    """A checkpoint of adapters, and what the model with them says."""
    run = our_run(folders, peft=peft)
    fill(run.model, adapters=True)
    return save_adapters(folders, run, peft, saved), our_logits(run, tokens())


def transformers_say(*found: Path) -> list[Tensor]:
    with torch.no_grad():
        return [hf_model(Folders(folder, folder))(tokens()).logits for folder in found]


@pytest.mark.parametrize("bits", [4, 8])
def test_merged_into_either_base(folders: Folders, tmp_path: Path, bits: int) -> None:
    peft = QLoRA(dim=4, alpha=8, bits=bits)
    checkpoint, over_quantised = launch(1, adapted, folders, peft, tmp_path / "qlora")[0]
    _, over_original = launch(1, adapted, folders, LoRA(dim=4, alpha=8), tmp_path / "lora")[0]
    original = export_checkpoint(checkpoint, tmp_path / "original")
    trained = export_checkpoint(checkpoint, tmp_path / "trained", merge_into=f"{bits}bit")
    found = launch(1, transformers_say, original, trained)[0]
    assert relative_error(found[0], over_original) < TOLERANCE
    assert relative_error(found[1], over_quantised) < TOLERANCE
    assert relative_error(found[0], found[1]) > 100 * TOLERANCE, "the bases differ"
    assert lineage.read(original).origin["merged_into"] == "original"
    assert "the original weights, not the quantised ones" in (original / "README.md").read_text()
    assert f"the {bits}bit weights they were trained on" in (trained / "README.md").read_text()
    with pytest.raises(CheckpointError, match=f"--merge-into {12 - bits}bit: .* use original or {bits}bit"):
        export_checkpoint(checkpoint, tmp_path / "other", merge_into=f"{12 - bits}bit")
    assert not (tmp_path / "other").exists()


def test_an_adapter_over_16_bits_has_no_choice(folders: Folders, tmp_path: Path) -> None:
    checkpoint, _ = launch(1, adapted, folders, LoRA(dim=4, alpha=8), tmp_path / "lora")[0]
    with pytest.raises(CheckpointError, match=r"--merge-into 4bit: .* was trained on original weights"):
        export_checkpoint(checkpoint, tmp_path / "out", merge_into="4bit")


def test_alone_it_is_the_lora_adapter_it_is(folders: Folders, tmp_path: Path) -> None:
    """The same factors under either scheme, so the same bytes and the same settings for peft."""
    both = [
        export_adapter(launch(1, adapted, folders, peft, tmp_path / name)[0][0], tmp_path / f"{name}-peft")
        for name, peft in (("qlora", QLoRA(dim=4, alpha=8)), ("lora", LoRA(dim=4, alpha=8)))
    ]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (both[0] / name).read_bytes() == (both[1] / name).read_bytes()


def generated_over(checkpoint: Path) -> Tensor:
    """Log-probabilities of `tokens` of the model that generates."""
    return InferenceModel.load(checkpoint, join(Topology(1)), dtype="fp32").likelihoods(tokens())[0].clone()


def test_it_generates_over_the_base_it_was_trained_over(folders: Folders, tmp_path: Path) -> None:
    checkpoint, logits = launch(1, adapted, folders, QLoRA(dim=4, alpha=8), tmp_path / "qlora")[0]
    found = launch(1, over_quantised_base, checkpoint)[0]
    following = tokens()[:, 1:, None]
    expected = logits[:, :-1].log_softmax(-1).gather(-1, following)[..., 0]
    assert relative_error(found, expected) < TOLERANCE


def over_quantised_base(checkpoint: Path) -> Tensor:
    import mixtral_recipes.inference.model as module

    @dataclasses.dataclass
    class NoTokenizer:
        eos_token_id: int = 2

    module.load_tokenizer = lambda *args, **named: NoTokenizer()  # the random model has none
    return generated_over(checkpoint)
