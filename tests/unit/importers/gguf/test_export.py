"""GGUF files: what gguf itself would have written of the same model, and nothing under the name that is not whole."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from mixtral_recipes import embedded
from mixtral_recipes.checkpoints.lineage import record
from mixtral_recipes.checkpoints.lineage.chain import Follower
from mixtral_recipes.cli.lineage import _tensors as tensors_of
from mixtral_recipes.cli.main import run
from mixtral_recipes.errors import CheckpointError, EnvironmentProblem
from mixtral_recipes.importers import exports
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.gguf import check as checks
from mixtral_recipes.importers.gguf import export as exporting
from mixtral_recipes.importers.gguf import extra, llama
from mixtral_recipes.importers.gguf.export import export_gguf
from mixtral_recipes.importers.gguf.reader import StoredFile
from mixtral_recipes.settings.peft import LoRA, QLoRA
from mixtral_recipes.system import packages
from tests.adapter_folder import make_adapter
from tests.gguf_by_hand import by_hand, needs_llama_cpp
from tests.mixtral_folder import mixtral_config, mixtral_tensors, write_model

TINY = embedded.resolve("embedded://mixtral_tiny")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 2003}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four more rows than the tokenizer has tokens."""
    config = mixtral_config(**SIZES, rope_theta=12345.0)
    folder = write_model(tmp_path_factory.mktemp("gguf") / "hf", config, mixtral_tensors(config, torch.bfloat16))
    for file in TINY.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def checkpoint(hf: Path) -> Path:
    return import_checkpoint(str(hf), hf.with_name("megatron"), progress=False)


def written(checkpoint: Path, output: Path, **options: Any) -> Path:
    return export_gguf(checkpoint, output, no_check=True, progress=False, **options)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_every_byte_is_ggufs(hf: Path, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    file = written(checkpoint, tmp_path / "m.gguf", quantization=kind.upper())
    expected = by_hand(hf, kind)
    reader: Any = gguf.GGUFReader(file)
    assert [tensor.name for tensor in reader.tensors] == [*expected]
    for tensor in reader.tensors:
        shape, chosen, content = expected[tensor.name]
        assert (tuple(reversed(tensor.shape)), tensor.tensor_type) == (shape, chosen)
        assert np.asarray(tensor.data).tobytes() == content, tensor.name
    assert file.stat().st_size % gguf.GGUF_DEFAULT_ALIGNMENT == 0


def test_metadata(checkpoint: Path, tmp_path: Path) -> None:
    stored = StoredFile(written(checkpoint, tmp_path / "m.gguf"))
    expected = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 12345.0,
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
        "llama.vocab_size": 2003,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: stored.field(name) for name in expected} == expected
    assert stored.field("llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    tokens, types = stored.field("tokenizer.ggml.tokens"), stored.field("tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 2003
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert tokens[-4:] == [f"[PAD{number}]" for number in range(1999, 2003)]
    assert types[1:3] == [gguf.TokenType.CONTROL] * 2
    assert types[-4:] == [gguf.TokenType.UNUSED] * 4


def test_files_that_come_with_it(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ending names the format; a lineage that follows the file, and a Modelfile, stand beside it."""
    file = tmp_path / "My model.gguf"
    assert run(["export", str(checkpoint), str(file), "--no-check"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "My model.lineage.json", "My model.Modelfile"}
    said = capsys.readouterr()
    assert said.out == f"{file}\n"
    assert f"ollama create my-model -f '{tmp_path / 'My model.Modelfile'}'" in said.err
    assert (tmp_path / "My model.Modelfile").read_text().startswith("FROM ./My model.gguf\n")
    links = Follower(tensors_of).follow(file)
    assert [(link.record.kind, link.state) for link in links] == [("export", "ok"), ("model", "ok"), ("source", "ok")]
    content = bytearray(file.read_bytes())
    for place in (200, len(content) - 100):  # the metadata, a weight
        changed = content.copy()
        changed[place] ^= 1
        file.write_bytes(changed)
        assert next(iter(Follower(tensors_of).follow(file))).state == "wrong", place


def test_what_qlora_adapters_are_merged_into_is_recorded(checkpoint: Path, tmp_path: Path) -> None:
    """And done: into the original weights as any adapter, or into those they were trained over."""
    lora, qlora = (make_adapter(checkpoint, kind(dim=2, alpha=4), tmp_path / kind.__name__) for kind in (LoRA, QLoRA))
    plain, original = written(lora, tmp_path / "plain.gguf"), written(qlora, tmp_path / "original.gguf")
    trained = written(qlora, tmp_path / "4bit.gguf", merge_into="4bit")
    said = [record.read(file).origin.get("merged_into") for file in (plain, original, trained)]
    assert said == [None, "original", "4bit"]
    assert original.read_bytes() == plain.read_bytes()
    name = "blk.0.ffn_down_exps.weight"
    values = [StoredFile(file).values(name, 0, 64) for file in (original, trained)]
    assert 0.02 < np.linalg.norm(values[0] - values[1]) / np.linalg.norm(values[0]) < 0.2  # NF4's rounding
    with pytest.raises(CheckpointError, match=r"--merge-into 8bit: .* use original or 4bit"):
        written(qlora, tmp_path / "8bit.gguf", merge_into="8bit")


def test_what_may_be_replaced(checkpoint: Path, tmp_path: Path) -> None:
    file = written(checkpoint, tmp_path / "m.gguf")
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"m\.gguf exists"):
        written(checkpoint, file)
    assert written(checkpoint, file, overwrite=True, quantization="bf16").read_bytes() != before
    file.unlink()  # as a process killed between two names leaves it
    written(checkpoint, file)
    (tmp_path / "m.lineage.json").unlink()
    with pytest.raises(CheckpointError, match=r"m\.gguf, m\.Modelfile .* not part of an export of m\.gguf"):
        written(checkpoint, file, overwrite=True)
    (tmp_path / "other.Modelfile").write_text("mine")
    with pytest.raises(CheckpointError, match=r"other\.Modelfile .* is not part of an export"):
        written(checkpoint, tmp_path / "other.gguf", overwrite=True)
    (tmp_path / "link.gguf").symlink_to(file)
    with pytest.raises(CheckpointError, match="is a link to"):
        written(checkpoint, tmp_path / "link.gguf", overwrite=True)
    with pytest.raises(CheckpointError, match="which is the input"):
        written(checkpoint, checkpoint / "weights" / "m.gguf")
    assert (tmp_path / "other.Modelfile").read_text() == "mine"


@needs_llama_cpp
def test_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    for options, message in (
        (
            {"quantization": "q4_k_m"},
            r"token_embd\.weight has rows of 64 weights, .* \d+ more .* of 256; use f16",
        ),
        ({"quantization": "q3_k"}, r"--quantization q3_k is not a known type.*Valid: .*q6_k"),
        ({"base": checkpoint}, "holds no adapters"),
    ):
        with pytest.raises(CheckpointError, match=message):
            written(checkpoint, file, **options)
    with pytest.raises(CheckpointError, match=r"whose name must end in \.gguf"):
        written(checkpoint, tmp_path / "folder")
    with pytest.raises(CheckpointError, match="--quantization has no effect with --format hf"):
        exports.export(checkpoint, tmp_path / "hf", "hf", quantization="f16")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(EnvironmentProblem, match="GB needed, "):
        written(checkpoint, file)
    monkeypatch.setattr(checks, "available_memory", lambda: 1000)
    with pytest.raises(EnvironmentProblem, match="--no-check"):
        export_gguf(checkpoint, file)

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(packages.importlib, "import_module", missing)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'mixtral-recipes\[gguf\]'"):
        export_gguf(checkpoint, file)
    monkeypatch.setattr(extra.platform, "machine", lambda: "aarch64")
    with pytest.raises(EnvironmentProblem, match=r"pip install 'mixtral-recipes\[gguf\]'"):
        extra.package("gguf")
    with pytest.raises(EnvironmentProblem, match="cyllama has no build for aarch64: pass --no-check"):
        extra.package("cyllama")
    assert list(tmp_path.iterdir()) == []


@needs_llama_cpp
def test_room_for_both_files_of_a_k_quant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in 16 bits is asked room for too, and is gone afterwards, when llama.cpp fails as well.

    It does not say why; so room is asked for what it had yet to write.
    """
    config = mixtral_config(hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=1999)
    folder = write_model(tmp_path / "hf", config, mixtral_tensors(config, torch.bfloat16))
    for file in TINY.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    checkpoint = import_checkpoint(str(folder), tmp_path / "megatron", progress=False)
    asked: list[int] = []
    monkeypatch.setattr(exporting, "check_room", lambda folder, nbytes: asked.append(nbytes))

    def fail(source: Path, target: Path, *_: Any, **__: Any) -> None:
        assert asked[0] > 1.2 * source.stat().st_size
        target.write_bytes(b"half")
        raise CheckpointError("llama.cpp could not quantize (of its own).")

    monkeypatch.setattr(llama, "quantize", fail)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="could not quantize"):
        written(checkpoint, tmp_path / "out" / "m.gguf", quantization="q6_k")
    assert list((tmp_path / "out").iterdir()) == []
    both, half, rest = asked
    assert both == half + rest + len(b"half")


def test_damage_and_values_that_do_not_fit(hf: Path, checkpoint: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(checkpoint, tmp_path / "damaged")
    file = max((copied / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"does not match its hash in the manifest|NaN or Inf"):
        written(copied, tmp_path / "m.gguf")
    config = mixtral_config(**SIZES)
    tensors = mixtral_tensors(config, torch.bfloat16)
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] = 1e5
    large = write_model(tmp_path / "large", config, tensors)
    for path in hf.glob("*token*"):
        shutil.copyfile(path, large / path.name)
    other = import_checkpoint(str(large), tmp_path / "other", progress=False)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight: holds .*use --quantization bf16"):
        written(other, tmp_path / "m.gguf")
    written(other, tmp_path / "m.gguf", quantization="bf16")
