"""llama.cpp computes with an exported GGUF what transformers does with the model, in every type of file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_recipes.importers.convert.exported import ExportedModel
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.megatron_to_hf import export_checkpoint
from mixtral_recipes.importers.gguf import llama, reference
from mixtral_recipes.importers.gguf.check import TEXTS, NextTokens
from mixtral_recipes.importers.gguf.export import export_gguf
from mixtral_recipes.importers.gguf.reader import StoredFile
from mixtral_recipes.importers.gguf.types import QUANTIZATIONS
from mixtral_recipes.settings.peft import LoRA
from tests.distributed.harness import launch
from tests.gguf_by_hand import needs_llama_cpp, random_mixtral, write_by_hand
from tests.parity.hf_mixtral import Folders, hf_model, our_run, save_adapters

pytestmark = needs_llama_cpp

SIZES = {
    "vocab_size": 1999,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "initializer_range": 0.05,
}
LLAMA_CPP = {"q6_k": 18, "q5_k_m": 17, "q4_k_m": 15, "q4_0": 2}  # llama_ftype


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    at = tmp_path_factory.mktemp("gguf")
    hf = random_mixtral(at / "hf", "embedded://mixtral_tiny", **SIZES)
    return Folders(hf, import_checkpoint(str(hf), at / "megatron", progress=False))


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    from mixtral_recipes.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("embedded://mixtral_tiny")
    return [list(tokenizer(text)["input_ids"])[:48] for text in TEXTS]


def transformers_logits(folders: Folders, sequences: list[list[int]]) -> list[np.ndarray]:
    model = hf_model(folders)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].numpy() for ids in sequences]


@pytest.fixture(scope="module")
def expected(folders: Folders, sequences: list[list[int]]) -> list[np.ndarray]:
    return launch(1, transformers_logits, folders, sequences)[0]


def divergence(file: Path, sequences: list[list[int]], expected: list[np.ndarray], at: Path) -> NextTokens:
    found = llama.run(file, [], sequences, at).logits
    return NextTokens.of(np.concatenate(expected), np.concatenate(found))


def test_layer_by_layer_is_the_whole_model(
    folders: Folders, sequences: list[list[int]], expected: list[np.ndarray], tmp_path: Path
) -> None:
    found = reference.logits(ExportedModel(folders.megatron), sequences, tmp_path)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("kind", list(QUANTIZATIONS))
def test_next_tokens(
    folders: Folders, sequences: list[list[int]], expected: list[np.ndarray], tmp_path: Path, kind: str
) -> None:
    """K-quants have the very bytes llama.cpp makes of a file that gguf wrote of the Hugging Face folder."""
    file = export_gguf(folders.megatron, tmp_path / "m.gguf", quantization=kind, no_check=True, progress=False)
    found = divergence(file, sequences, expected, tmp_path)
    at_most = {"f16": 1e-5, "bf16": 1e-2, "q8_0": 1e-2}
    if kind in at_most:
        assert found.kl <= at_most[kind], found
        return
    plain = write_by_hand(folders.hf, "bf16", file, tmp_path / "bf16.gguf")
    llama.quantize(plain, tmp_path / "theirs.gguf", LLAMA_CPP[kind], 2)
    theirs = divergence(tmp_path / "theirs.gguf", sequences, expected, tmp_path)
    assert 1e-4 < found.kl <= 1.1 * theirs.kl
    ours, their_file = StoredFile(file), StoredFile(tmp_path / "theirs.gguf")
    assert ours.field("general.file_type") == their_file.field("general.file_type") == LLAMA_CPP[kind]
    if QUANTIZATIONS[kind].by_llama_cpp:
        assert all(np.array_equal(ours.rows(name), their_file.rows(name)) for name in ours.tensors)
        assert not list(tmp_path.glob(".*"))


def adapter_checkpoint(folders: Folders, saved: Path) -> Path:
    """Random adapters on every linear layer, saved as training saves them."""
    from mixtral_recipes.importers.hf import config as hf_config
    from mixtral_recipes.importers.hf.source import read_config
    from mixtral_recipes.models.config import MixtralConfig
    from tests.distributed.small_run import fill

    peft = LoRA(dim=4, alpha=8)
    fields = hf_config.to_megatron(read_config(folders.hf))
    config: Any = MixtralConfig(**fields, seq_length=64)
    run = our_run(folders, peft=peft, config=config)
    fill(run.model, adapters=True)
    return save_adapters(folders, run, peft, saved)


def test_adapters_are_merged_on_the_way(folders: Folders, tmp_path: Path) -> None:
    """The whole command, checked against transformers; the same tensors as of the merged Hugging Face folder."""
    checkpoint = launch(1, adapter_checkpoint, folders, tmp_path / "run")[0]
    told: dict[str, Any] = {}
    file = export_gguf(checkpoint, tmp_path / "m.gguf", progress=False, told=told)
    assert told["check"]["kl_median"] <= 1e-5  # the mean shows a token that went to another expert
    assert told["check"]["top1"] > 0.95
    assert {kind: entry["count"] for kind, entry in told["check"]["tensors"].items()} == {"F16": 23, "F32": 10}
    merged = export_checkpoint(checkpoint, tmp_path / "merged", dtype="fp32", progress=False)
    theirs = StoredFile(write_by_hand(merged, "f16", file, tmp_path / "theirs.gguf"))
    ours = StoredFile(file)
    base = StoredFile(write_by_hand(folders.hf, "f16", file, tmp_path / "base.gguf"))
    assert all(np.array_equal(ours.rows(name), theirs.rows(name)) for name in theirs.tensors)
    changed = [name for name in theirs.tensors if not np.array_equal(base.rows(name), ours.rows(name))]
    assert len(changed) == 3 * 7
