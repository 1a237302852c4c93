"""pytorch_model.bin as others write it: aligned, zipped again, compressed, big-endian."""

import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixtral_recipes.checkpoints.format.manifest import read_manifest
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.convert.hf_to_megatron import import_checkpoint
from mixtral_recipes.importers.convert.verify import verify_checkpoint
from mixtral_recipes.importers.hf.pickle import read_tensors

Change = Callable[[zipfile.ZipInfo, bytes], bytes]


def same(record: zipfile.ZipInfo, content: bytes) -> bytes:
    return content


def zip_again(path: Path, change: Change = same, kind: int = zipfile.ZIP_STORED, align: int = 0) -> None:
    """Zip a file's records again, each beginning at a multiple of ``align``, as zipalign does with its argument."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w", kind) as new:
        for record in old.infolist():
            entry = zipfile.ZipInfo(record.filename)
            entry.compress_type = kind
            if align:
                start = buffer.tell() + 30 + len(entry.filename)
                entry.extra = b"\0" * (-start % align)
            new.writestr(entry, change(record, old.read(record)))
    path.write_bytes(buffer.getvalue())


def in_big_endian(record: zipfile.ZipInfo, content: bytes) -> bytes:
    if record.filename.endswith("byteorder"):
        return b"big"
    return content[::-1] if "/data/" in record.filename else content


@pytest.mark.parametrize("align", [0, 4, 4096])
def test_the_places_are_the_archives_own(make_model, tmp_path: Path, align: int) -> None:
    plain, _, _ = make_model("plain", kind="bin")
    folder, _, _ = make_model("aligned", kind="bin")
    zip_again(folder / "pytorch_model.bin", align=align)
    wanted = read_manifest(import_checkpoint(str(plain), tmp_path / "one", progress=False))["tensors"]
    out = import_checkpoint(str(folder), tmp_path / "two", progress=False)
    assert read_manifest(out)["tensors"] == wanted
    assert verify_checkpoint(out, against=str(folder), progress=False).passed


def _add(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.infolist()[-1].filename, b"more")


def _swap(path: Path) -> None:
    """Let two records' entries in the directory point at each other's place."""
    content = bytearray(path.read_bytes())
    names = [name for name in zipfile.ZipFile(path).namelist() if "/data/" in name][:2]
    entries = [content.rindex(b"PK\1\2", 0, content.rindex(name.encode())) for name in names]
    first, second = (bytes(content[at + 42 : at + 46]) for at in entries)
    content[entries[0] + 42 : entries[0] + 46], content[entries[1] + 42 : entries[1] + 46] = second, first
    path.write_bytes(content)


def _lengthen(path: Path) -> None:
    """Let a record's own header say that more stands before its content, which then ends in the next record."""
    content = bytearray(path.read_bytes())
    header = content.index(b"PK\3\4", content.index(b"/data/0"))
    content[header + 28 : header + 30] = (int.from_bytes(content[header + 28 : header + 30], "little") + 640).to_bytes(
        2, "little"
    )
    path.write_bytes(content)


REFUSED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "deflated": ("is compressed", lambda path: zip_again(path, kind=zipfile.ZIP_DEFLATED)),
    "big-endian": ("its bytes are in big-endian order", lambda path: zip_again(path, in_big_endian)),
    "a record shortened": (
        "needs more bytes than its record",
        lambda path: zip_again(path, lambda record, data: data[:-2] if "/data/" in record.filename else data),
    ),
    "a record that reaches into the next": ("overlaps the next one", _lengthen),
    "two records of one name": ("have the same name", _add),
    "a directory that points elsewhere": ("differ", _swap),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(make_model, kind: str) -> None:
    why, change = REFUSED[kind]
    folder, _, _ = make_model(kind="bin")
    change(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin: refused, .*{why}.*; save the model as safetensors"):
        read_tensors(folder / "pytorch_model.bin")


def test_big_endian_ends_in_one_line(make_model, tmp_path: Path) -> None:
    """In a process of its own: torch's reader is killed by such a file."""
    folder, _, _ = make_model(kind="bin")
    zip_again(folder / "pytorch_model.bin", in_big_endian)
    command = [sys.executable, "-m", "mixtral_recipes.cli.main", "import", str(folder), "--output", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "500"}, check=False)
    assert done.returncode == 2
    assert "big-endian" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_training_code_saves(tmp_path: Path) -> None:
    """A module's state dict, which is more than a dictionary, and parameters."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = {name: value for name, value in module.state_dict().items() if value.dtype == torch.float32}
    whole = torch.nn.Linear(3, 4)
    torch.save(whole.state_dict(), tmp_path / "state.bin")
    torch.save(dict(whole.named_parameters()), tmp_path / "parameters.bin")
    torch.save(state, tmp_path / "plain.bin")
    saved = {"state": whole.state_dict(), "parameters": whole.state_dict(), "plain": state}
    for stem, wanted in saved.items():
        file = tmp_path / f"{stem}.bin"
        found = read_tensors(file)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            out = bytearray(wanted[name].nbytes)
            tensor.extent.read(0, tensor.extent.rows, memoryview(out))
            assert out == wanted[name].numpy().tobytes()


def test_tensors_that_are_more_than_their_numbers(tmp_path: Path) -> None:
    torch.save({"w": torch._neg_view(torch.ones(3))}, tmp_path / "m.bin")
    with pytest.raises(CheckpointError, match="with hooks or notes"):
        read_tensors(tmp_path / "m.bin")
