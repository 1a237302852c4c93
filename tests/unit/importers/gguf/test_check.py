"""What the comparison behind an export finds: it is the last thing between a wrong file and whoever loads it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtral_recipes.checkpoints.format.rows import Extent
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.exported import ExportedModel
from mixtral_recipes.importers.gguf import check as checks
from mixtral_recipes.importers.gguf import llama
from mixtral_recipes.importers.gguf.check import NextTokens, _compare_tensors, _refuse
from mixtral_recipes.importers.gguf.reader import StoredFile
from mixtral_recipes.importers.gguf.types import QUANTIZATIONS


def gguf_file(path: Path, weight: torch.Tensor, kind: str) -> StoredFile:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    chosen = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("a.weight", gguf.quants.quantize(weight.numpy(), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return StoredFile(path)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_tensors(tmp_path: Path, kind: str) -> None:
    """Rounding passes; another row in one's place, or a value off by more than a step, does not."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def stored(tensor: torch.Tensor, name: str) -> Extent:
        (tmp_path / name).write_bytes(tensor.numpy().tobytes())
        return Extent(str(tmp_path / name), 0, "F32", 64, 512)

    file = gguf_file(tmp_path / "m.gguf", weight, kind)
    errors, counts = _compare_tensors(file, {"a.weight": stored(weight, "right")}, lambda _: None)
    assert counts == {kind: 1}
    assert errors[kind] <= {"F32": 0, "F16": 3e-4, "Q8_0": 6e-3, "Q4_0": 0.1}[kind]
    swapped = weight.clone()
    swapped[[3, 4]] = weight[[4, 3]]
    with pytest.raises(CheckpointError, match=r"a\.weight, row 3: differs from the checkpoint"):
        _compare_tensors(file, {"a.weight": stored(swapped, "wrong")}, lambda _: None)
    with pytest.raises(CheckpointError, match=f"a.weight as {kind} differs from the checkpoint by"):
        _compare_tensors(file, {"a.weight": stored(weight * 1.2, "off")}, lambda _: None)
    with pytest.raises(CheckpointError, match=r"a\.weight is in only one of"):
        _compare_tensors(file, {"b.weight": stored(weight, "other")}, lambda _: None)


def test_next_tokens() -> None:
    """A sure model's likeliest tokens count, a random one's do not; divergence counts for both."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(200, 50)).astype(np.float32)
    sure = 8 * logits
    noise = random.normal(size=logits.shape).astype(np.float32)
    same = NextTokens.of(sure, sure)
    assert (same.kl, same.top1, same.top1_clear) == (0.0, 1.0, 1.0)
    assert same.clear > 0.5 > NextTokens.of(logits, logits).clear
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(torch.from_numpy(logits + noise), -1),
        torch.log_softmax(torch.from_numpy(logits), -1),
        log_target=True,
        reduction="batchmean",
    )
    assert NextTokens.of(logits, logits + noise).kl == pytest.approx(expected.item(), rel=1e-5)
    for kind in QUANTIZATIONS.values():
        _refuse(NextTokens.of(sure, sure + 0.01 * noise), kind)
        for wrong in (np.roll(sure, 1, axis=0), sure + 4 * noise):
            with pytest.raises(CheckpointError, match=f"{kind.name}: the file's next tokens diverge"):
                _refuse(NextTokens.of(sure, wrong), kind)
        with pytest.raises(CheckpointError, match="diverge"):
            _refuse(NextTokens.of(logits, np.roll(logits, 1, axis=0)), kind)


def test_a_text_that_llama_cpp_splits_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mixtral_recipes.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("embedded://mixtral_tiny")
    monkeypatch.setattr(checks, "StoredFile", lambda path: type("File", (), {"field": lambda self, name: 512})())
    monkeypatch.setattr(
        llama, "run", lambda file, texts, sequences, folder: llama.Run([[1, 2]] * len(texts), [np.zeros((1, 1))])
    )
    with pytest.raises(CheckpointError, match=r"llama\.cpp splits 'Hello world' into \[1, 2\]"):
        checks._compare_tokens(tmp_path / "m.gguf", ExportedModel(tmp_path), tokenizer, tmp_path)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"llama\.cpp cannot run the file \(.+\)\."):
        llama.run(tmp_path / "m.gguf", ["a"], [[1]], tmp_path)
