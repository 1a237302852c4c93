"""verify finds what is wrong, and says where."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_recipes.checkpoints.format.integrity import verify
from mixtral_recipes.checkpoints.format.manifest import read_manifest, write_manifest
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.verify import Report, verify_checkpoint
from mixtral_recipes.importers.hf import pickle as pickle_io
from mixtral_recipes.importers.hf import safetensors as safetensors_io
from mixtral_recipes.importers.hf.source import open_source


def failures(report: Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if not check.passed}


@pytest.fixture
def imported(make_model, tmp_path: Path) -> tuple[Path, Path]:
    folder, _, _ = make_model()
    return folder, import_checkpoint(str(folder), tmp_path / "megatron")


def flip_bit(checkpoint: Path, needle: bytes) -> None:
    """Flip one bit of the stored tensor that begins with ``needle``."""
    for path in (checkpoint / "weights").glob("*.distcp"):
        data = bytearray(path.read_bytes())
        if (at := data.find(needle)) >= 0:
            data[at + 100] ^= 0x04
            path.write_bytes(data)
            return
    raise AssertionError("which the model in")


def test_a_sound_checkpoint(imported: tuple[Path, Path]) -> None:
    folder, checkpoint = imported
    report = verify_checkpoint(checkpoint, against=str(folder))
    assert report.passed, report
    assert [check.name for check in report.checks] == ["files", "structure", "tensors", "config"]
    assert json.loads(json.dumps(report.as_dict()))["passed"] is True
    assert verify_checkpoint(checkpoint).passed


def test_one_flipped_bit_in_one_expert(imported: tuple[Path, Path]) -> None:
    folder, checkpoint = imported
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    flip_bit(checkpoint, tensor.view(-1)[:32].view(torch.uint8).numpy().tobytes())
    found = failures(verify_checkpoint(checkpoint))
    assert found.keys() == {"files", "tensors"}
    assert ".distcp" in found["files"]
    assert name in found["tensors"]
    assert "differs from the source" in failures(verify_checkpoint(checkpoint, against=str(folder)))["tensors"]


def test_a_flipped_bit_with_the_hashes_made_anew(imported: tuple[Path, Path]) -> None:
    """Only the comparison with the source can tell."""
    folder, checkpoint = imported
    name = "model.layers.0.block_sparse_moe.experts.0.w3.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    flip_bit(checkpoint, tensor.view(-1)[:32].view(torch.uint8).numpy().tobytes())
    write_manifest(checkpoint, "model")
    assert verify_checkpoint(checkpoint).passed
    found = failures(verify_checkpoint(checkpoint, against=str(folder)))
    assert name in found["tensors"]


def test_another_source(imported: tuple[Path, Path], make_model) -> None:
    _, checkpoint = imported
    other, _, _ = make_model("other", seed=9)
    assert failures(verify_checkpoint(checkpoint, against=str(other))).keys() == {"tensors"}
    rope, _, _ = make_model("rope", rope_theta=1e4)
    assert "rotary_base" in failures(verify_checkpoint(checkpoint, against=str(rope)))["config"]


def test_missing_and_changed_files(imported: tuple[Path, Path], tmp_path: Path) -> None:
    _, checkpoint = imported
    verify(checkpoint)
    for name in read_manifest(checkpoint)["files"]:
        copy = tmp_path / "copy"
        shutil.copytree(checkpoint, copy)
        (copy / name).unlink()
        with pytest.raises(CheckpointError, match="missing"):
            verify(copy)
        shutil.copyfile(checkpoint / name, copy / name)
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(CheckpointError, match="SHA-256"):
            verify(copy)
        (copy / name).write_bytes(bytes(data) + b"x")
        with pytest.raises(CheckpointError, match="bytes"):
            verify(copy)
        shutil.rmtree(copy)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(CheckpointError):
        verify_checkpoint(tmp_path)


def test_a_checkpoint_without_its_config(imported: tuple[Path, Path]) -> None:
    shutil.rmtree(imported[1] / "context")
    with pytest.raises(CheckpointError, match=r"megatron/context/config\.json is missing"):
        verify_checkpoint(imported[1])


def test_a_source_changed_since(imported: tuple[Path, Path]) -> None:
    folder, checkpoint = imported
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert open_source(folder).layout == "v4"
    found = failures(verify_checkpoint(checkpoint, against=str(folder)))
    assert "model.layers.0.self_attn.k_proj.weight: differs from the source, first in row 0" in found["tensors"]


@pytest.mark.parametrize(("layout", "kind"), [("v4", "st"), ("v5", "st"), ("v4", "bin")])
def test_the_source_is_read_by_other_code(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, kind: str
) -> None:
    """A reader that takes tensors from a wrong place imports them wrong, and verify must not agree with it."""
    folder, _, _ = make_model(layout=layout, kind=kind, shards=2)
    assert verify_checkpoint(import_checkpoint(str(folder), tmp_path / "right"), against=str(folder)).passed

    def shifted(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> safetensors_io.StoredTensor:
        return stored(path, offset - 2, dtype, shape)

    stored = safetensors_io.stored
    monkeypatch.setattr(safetensors_io, "stored", shifted)
    monkeypatch.setattr(pickle_io, "stored", shifted)
    monkeypatch.setattr("mixtral_recipes.checkpoints.format.stream.is_finite", lambda *_: True)
    wrong = import_checkpoint(str(folder), tmp_path / "wrong")
    assert list(failures(verify_checkpoint(wrong, against=str(folder)))) == ["tensors"]
