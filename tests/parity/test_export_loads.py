"""What an export can be loaded as: with other heads, and in 8 and 4 bits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_recipes import embedded
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from tests.distributed.harness import launch

HEADS = {
    "MixtralForSequenceClassification": {"score.weight"},
    "MixtralForTokenClassification": {"score.weight", "score.bias"},
    "MixtralForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
}
BITS: dict[str, dict[str, Any]] = {
    "load_in_8bit": {"load_in_8bit": True},
    "load_in_4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}
LARGEST_KL = {"load_in_8bit": 0.02, "load_in_4bit": 0.2}  # of next tokens; 0.002 and 0.05 were measured
ATTENTION = 4 * 4  # linear layers


def make(folder: Path) -> Path:
    checkpoint = import_checkpoint(str(embedded.resolve("embedded://mixtral_tiny")), folder / "m", progress=False)
    return export_checkpoint(checkpoint, folder / "exported")


def with_head(folder: Path, name: str) -> tuple[dict[str, Any], bool]:
    """What loading had to say, and whether the body is the model's."""
    import transformers

    model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    whole = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    body = whole.model.state_dict()
    return told, all(torch.equal(value, body[key]) for key, value in model.base_model.state_dict().items())


def in_bits(folder: Path, name: str) -> tuple[int, float, int]:
    """Quantised layers, the divergence of next tokens from the whole model's, and how many tokens were generated."""
    from transformers import BitsAndBytesConfig, MixtralForCausalLM

    ids = torch.randint(3, 1900, (2, 40), generator=torch.Generator().manual_seed(0))
    whole: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    small: Any = MixtralForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**BITS[name]), device_map="cpu"
    ).eval()
    with torch.no_grad():
        expected, found = (model(ids).logits.float().log_softmax(-1) for model in (whole, small))
        new = small.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=4, max_new_tokens=4)
    layers = [layer for layer in small.modules() if type(layer).__name__ in ("Linear8bitLt", "Linear4bit")]
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    return len(layers), float(divergence), new.shape[1] - ids.shape[1]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(1, make, tmp_path_factory.mktemp("model"))[0]


@pytest.mark.parametrize("name", HEADS)
def test_with_another_head(exported: Path, name: str) -> None:
    told, same_body = launch(1, with_head, exported, name)[0]
    assert told["missing_keys"] == HEADS[name]
    assert told["unexpected_keys"] == {"lm_head.weight"}
    assert not told["mismatched_keys"]
    assert same_body


@pytest.mark.parametrize("name", BITS)
def test_in_fewer_bits(exported: Path, name: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layers, divergence, new = launch(1, in_bits, exported, name)[0]
    assert (layers, new) == (ATTENTION, 4)
    assert 0 < divergence < LARGEST_KL[name]
