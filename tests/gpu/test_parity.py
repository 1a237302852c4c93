"""In bf16 on a GPU a model says what transformers says, as far as bf16 goes: in training, generation and exports."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_recipes import api
from mixtral_recipes.cpu import device as cpu_device
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.inference.generate import generate
from mixtral_recipes.inference.model import InferenceModel, join
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.layout.topology import Topology
from mixtral_recipes.settings.peft import LoRA
from mixtral_recipes.training import distributed
from tests.gpu.small_runs import train

PROMPTS, LENGTH, NEW = 4, 32, 24


def prompts() -> Tensor:
    return torch.randint(3, 1900, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(3))


def by_transformers(folder: Path, ids: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logits [rows, tokens, vocabulary] in fp32."""
    from transformers import MixtralForCausalLM

    cpu_device.deactivate()  # transformers shall find torch as it is
    # Its experts one by one: the grouped product is not there in fp32 on every card and torch.
    kinds = {"dtype": dtype, "experts_implementation": "eager"}
    model: Any = MixtralForCausalLM.from_pretrained(folder, **kinds).to(device).eval()
    with torch.no_grad():
        return model(ids.to(device)).logits.float().cpu()


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference at the median token.

    Where rounding makes a router choose another expert, a token is dozens of times as far off. That strikes a few
    tokens, others on each device, and would be most of a mean.
    """
    return (a - b).square().mean(-1).sqrt().median().item()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with the embedded one's tokenizer; ``hf`` and, imported, ``megatron`` in a folder."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from mixtral_recipes import embedded

    cpu_device.deactivate()
    folder = tmp_path_factory.mktemp("model")
    source = embedded.resolve("embedded://mixtral_tiny")
    shutil.copytree(source, folder / "hf", ignore=shutil.ignore_patterns("*.safetensors", "README*"))
    torch.manual_seed(0)
    config = MixtralConfig.from_pretrained(source, initializer_range=0.1)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "hf")
    import_checkpoint(str(folder / "hf"), folder / "megatron", progress=False)
    return folder


def ours(checkpoint: Path, ids: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Logits of whole sequences, and what follows them, the likeliest token again and again."""
    try:
        loaded = InferenceModel.load(checkpoint, join(Topology()), dtype="bf16")
        with torch.no_grad():
            logits = loaded.chunk(ids.to(loaded.device), None, None)[..., : loaded.config.vocab_size].float().cpu()
        found = generate(loaded, ids.tolist(), Sampling(max_new_tokens=NEW), batch_size=PROMPTS)
    finally:
        distributed.shut_down()
    return logits, [each.tokens for each in found]


def check(hf: Path, checkpoint: Path, device: torch.device, *, noises: float) -> None:
    """Compare with transformers; its own bf16 says how large bf16's noise is.

    Args:
        hf: The model in transformers' form.
        checkpoint: In ours.
        device: Where both run.
        noises: How many times the noise our logits may be from fp32's: two independent roundings are 1.4 apart.
    """
    ids = prompts()
    exact = by_transformers(hf, ids, device, torch.float32)
    noise = distance(by_transformers(hf, ids, device, torch.bfloat16), exact)
    assert 0 < noise < 0.3 * exact.std().item()
    logits, texts = ours(checkpoint, ids)
    assert distance(logits, exact) < noises * noise
    behind = []  # how much likelier another token was; token by token, through the cache
    for prompt, text in zip(ids.tolist(), texts, strict=True):
        told = by_transformers(hf, torch.tensor([prompt + text]), device, torch.float32)[0]
        behind += [float(told[place].max() - told[place, token]) for place, token in enumerate(text, start=LENGTH - 1)]
    assert sum(each > 10 * noise for each in behind) <= 1 + len(behind) / 8, behind  # other experts, as in `distance`


def test_a_model_says_what_transformers_says(model: Path, cuda: torch.device) -> None:
    check(model / "hf", model / "megatron", cuda, noises=2)


def test_a_changed_expert_is_noticed(model: Path, tmp_path: Path, cuda: torch.device) -> None:
    from transformers import MixtralForCausalLM

    exact = by_transformers(model / "hf", prompts(), cuda, torch.float32)
    noise = distance(by_transformers(model / "hf", prompts(), cuda, torch.bfloat16), exact)
    changed: Any = MixtralForCausalLM.from_pretrained(model / "hf", dtype=torch.bfloat16)
    with torch.no_grad():
        changed.model.layers[0].mlp.experts.down_proj[3] *= 3
    shutil.copytree(model / "hf", tmp_path / "hf")
    changed.save_pretrained(tmp_path / "hf")
    import_checkpoint(str(tmp_path / "hf"), tmp_path / "megatron", progress=False)
    assert distance(ours(tmp_path / "megatron", prompts())[0], exact) > 2 * noise


@pytest.mark.parametrize("peft", [None, LoRA(dim=8, alpha=16, dropout=0.0)], ids=["full", "lora"])
def test_what_was_trained_is_exported(tmp_path: Path, base: str, cuda: torch.device, peft: Any) -> None:
    """Saved, exported (adapters merged), loaded by transformers; merging rounds the weights once more."""
    trained = train(tmp_path, steps=4, base=base, peft=peft, save=True, lr=5e-3 if peft else 1e-3)
    exported = api.export_ckpt(trained.checkpoint, target="hf", output_path=tmp_path / "hf")
    check(exported, Path(trained.checkpoint), cuda, noises=4 if peft else 2)
