"""Checkpoints made to run something when they are read: each is refused, the file named, and nothing is run."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from mixtral_recipes.checkpoints.format.integrity import damage_of
from mixtral_recipes.checkpoints.format.manifest import read_manifest, write_manifest
from mixtral_recipes.checkpoints.format.reader import StoredWeights
from mixtral_recipes.checkpoints.format.restricted_pickle import metadata_from, read_metadata
from mixtral_recipes.checkpoints.format.shard import Shard
from mixtral_recipes.checkpoints.format.writer import torch_bytes, write_file, write_metadata
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.hf.pickle import read_tensors

OBJECT = "common_state/shard_0_1"


class Call:
    """Pickles as a call of a function given by its names."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def by_name(module: str, name: str, *args: str) -> bytes:
    """A pickle (protocol 4) that calls ``module.name``, whatever dots the name has."""

    def text(value: str) -> bytes:
        data = value.encode()
        return b"\x8c" + bytes([len(data)]) + data

    return b"\x80\x04" + text(module) + text(name) + b"\x93(" + b"".join(map(text, args)) + b"tR."


def write_checkpoint(folder: Path) -> Path:
    """A whole checkpoint of one tensor."""
    weights = folder / "weights"
    weights.mkdir(parents=True)
    shard = Shard("w", torch.arange(12.0), (0, 0), (3, 4), (3, 4))
    buffer = io.BytesIO()
    torch.save([{"step": 3}], buffer)
    write_metadata(weights, [write_file(weights, 0, [shard], {OBJECT: buffer.getvalue()})])
    (folder / "context").mkdir()
    (folder / "context" / "run.json").write_text("{}")
    write_manifest(folder, "training")
    return folder


def read_all(folder: Path) -> None:
    """Read everything, as a resumed run does."""
    stored = StoredWeights(folder / "weights")
    stored.read_into([Shard("w", torch.empty(12), (0, 0), (3, 4), (3, 4))])
    stored.read_object(OBJECT)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


METADATA: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda m: pickle.dumps(Call(os.system, f"touch {m}")),
    "os.system, protocol 0": lambda m: pickle.dumps(Call(os.system, f"touch {m}"), protocol=0),
    "eval": lambda m: pickle.dumps(Call(eval, f"open({str(m)!r}, 'w')")),
    "exec": lambda m: pickle.dumps(Call(exec, f"open({str(m)!r}, 'w')")),
    "open": lambda m: pickle.dumps(Call(open, str(m), "w")),
    "subprocess": lambda m: by_name("subprocess", "check_call", f"touch {m}"),
    "a class with a side effect, by a dotted name": lambda m: by_name(
        "torch.distributed.checkpoint.filesystem", "io.FileIO", str(m), "w"
    ),
    "a function of an allowed module": lambda m: by_name(
        "torch.distributed.checkpoint.metadata", "os.system", f"touch {m}"
    ),
    "a dotted name under torch": lambda m: by_name("torch", "os.system", f"touch {m}"),
    "torch.load": lambda m: by_name("torch", "load", str(m)),
    "a method of a path": lambda m: by_name("pathlib", "PosixPath.touch", str(m)),
    "torch's bytes loader": lambda m: by_name("torch.storage", "_load_from_bytes", str(m)),
    "numpy's loader": lambda m: by_name("numpy", "load", str(m)),
    "importlib": lambda m: by_name("importlib", "import_module", "antigravity"),
    "another class of torch's": lambda m: by_name(
        "torch.distributed.checkpoint.filesystem", "FileSystemWriter", str(m)
    ),
    "attributes of a class": lambda m: b"\x80\x02cpathlib\nPosixPath\n(N}X\n\x00\x00\x00is_symlinkcbuiltins\nset\nstb.",
    "attributes of a class, by its state": lambda m: b"\x80\x02cpathlib\nPosixPath\n}X\x01\x00\x00\x00xNsb.",
    "attributes of an allowed class": lambda m: (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x07\x00\x00\x00versionNstb."
    ),
    "an attribute that is not listed": lambda m: (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}X\x07\x00\x00\x00__doc__Nsb."
    ),
    "a memo for four thousand million values": lambda m: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a text of four thousand million letters": lambda m: b"\x80\x02X\xff\xff\xff\xff.",
    "a number of 255 bytes": lambda m: b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "a thousand open lists": lambda m: b"\x80\x02" + b"(" * 1000 + b".",
    "a key that takes for ever to hash": lambda m: b"\x80\x02})" + b"q\x00h\x00\x86" * 40 + b"Ns.",
    "not a Metadata": lambda m: pickle.dumps({"state_dict_metadata": {}}),
    "no pickle": lambda m: b"\x00" * 100,
    "nothing": lambda m: b"",
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata(tmp_path: Path, marker: Path, kind: str) -> None:
    folder = write_checkpoint(tmp_path / "ckpt")
    (folder / "weights" / ".metadata").write_bytes(METADATA[kind](marker))
    before = Path.is_symlink, type(folder).__dict__.get("is_symlink"), Metadata.__dict__.get("version")
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_all(folder)
    assert not marker.exists()
    assert before == (Path.is_symlink, type(folder).__dict__.get("is_symlink"), Metadata.__dict__.get("version"))


def test_nine_bytes_take_no_memory() -> None:
    """Python's unpicklers make room for as many values as a file says it will keep."""
    code = (
        "import resource, sys\n"
        "from mixtral_recipes.checkpoints.format.restricted_pickle import metadata_from\n"
        "resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), -1))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: metadata_from(b'\\x80\\x02Nr\\xff\\xff\\xff\\x7f.')\n"
        "except Exception as error: print(error, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(24 << 30)], capture_output=True, text=True, check=True)
    message, _, grown = done.stdout.rpartition(" ")
    assert message == "contains a NoneType, not a checkpoint's metadata"
    assert int(grown) < 1 << 18  # KiB


def _many(values: bytes, count: int) -> bytes:
    return b"(" + values * count


def _text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


TIMES = 20_000
REPEATED: dict[str, bytes] = {  # a small pickle that has one large value copied over and over
    "a size": b"ctorch\nSize\n](" + b"K\1" * TIMES + b"e\x85q\0" + _many(b"ctorch\nSize\nh\0R", TIMES),
    "a set": b"cbuiltins\nset\n](" + _text("a") * TIMES + b"e\x85q\0" + _many(b"cbuiltins\nset\nh\0R", TIMES),
    "a path": _many(_text("a"), TIMES) + b"tq\0" + _many(b"cpathlib\nPosixPath\nh\0R", TIMES),
    "a dictionary": b"}("
    + b"".join(_text(str(number)) + b"N" for number in range(TIMES))
    + b"u\x85q\0"
    + _many(b"ccollections\nOrderedDict\nh\0R", TIMES),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_nothing_is_copied_over_and_over(kind: str) -> None:
    with pytest.raises(CheckpointError, match=r"passes more than|at most 8 |takes 0 pos"):
        metadata_from(b"\x80\2" + REPEATED[kind] + b"t.")


def test_what_many_share_is_looked_at_once() -> None:
    """Or a file of 200 KB would be looked at for minutes."""
    chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))] * 10_000
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([1]), chunks)
    many = {str(number): copy.copy(entry) for number in range(10_000)}
    found = metadata_from(pickle.dumps(Metadata(many, storage_data={})))
    assert len(found.state_dict_metadata) == 10_000
    chunks.append("none")  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match="an incomplete ChunkStorageMetadata"):
        metadata_from(pickle.dumps(Metadata(many, storage_data={})))


@pytest.mark.parametrize("axes", [9, 60])
def test_a_tensor_of_many_axes(tmp_path: Path, axes: int) -> None:
    """Each box has a corner for every choice of an end on every axis."""
    folder = write_checkpoint(tmp_path / "ckpt")
    metadata = read_metadata(folder / "weights")
    metadata.state_dict_metadata["w"].size = torch.Size([1] * axes)
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="at most 8 whole numbers"):
        read_all(folder)


def test_metadata_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        StoredWeights(tmp_path)


def test_metadata_lacks_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt")
    metadata = read_metadata(folder / "weights")
    for info in metadata.storage_data.values():
        del info.offset
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="an incomplete _StorageInfo"):
        read_all(folder)


def test_only_listed_attributes_are_set(tmp_path: Path) -> None:
    """Of a checkpoint that is whole otherwise."""
    metadata = read_metadata(write_checkpoint(tmp_path / "ckpt") / "weights")
    for attribute, value in (("hidden", "x"), ("version", 3)):
        changed = copy.copy(metadata)
        setattr(changed, attribute, value)
        with pytest.raises(CheckpointError, match=f"has a Metadata whose {attribute} is a {type(value).__name__}"):
            metadata_from(pickle.dumps(changed))


@pytest.mark.parametrize("size", [(3, -1), (True, 4), (1 << 63,)])
def test_sizes_are_sizes(size: tuple[int, ...]) -> None:
    content = pickle.dumps(Call(torch.Size, size))
    with pytest.raises(CheckpointError, match="whole numbers"):
        metadata_from(content)


def _zip_with(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


ITEMS: dict[str, Callable[[Path], bytes]] = {
    "an object saved by torch": lambda m: torch_bytes([Call(os.system, f"touch {m}")]),
    "a tensor's place taken by a call": lambda m: torch_bytes(Call(eval, f"open({str(m)!r}, 'w')")),
    "a plain pickle": lambda m: pickle.dumps(Call(os.system, f"touch {m}")),
    "an archive that climbs out": lambda m: _zip_with(f"archive/../../../{m.name}", b"x"),
    "an archive with an absolute name": lambda m: _zip_with(str(m), b"x"),
    "an archive whose pickle calls": lambda m: _zip_with(
        "archive/data.pkl", pickle.dumps(Call(os.system, f"touch {m}"))
    ),
    "nothing": lambda m: b"",
}


@pytest.mark.parametrize("key", ["w", OBJECT])
@pytest.mark.parametrize("kind", ITEMS)
def test_what_stands_in_a_weight_file(tmp_path: Path, marker: Path, kind: str, key: str) -> None:
    folder = write_checkpoint(tmp_path / "ckpt")
    metadata = read_metadata(folder / "weights")
    content = ITEMS[kind](marker)
    for index, info in metadata.storage_data.items():
        if index.fqn == key:
            info.offset, info.length = 0, len(content)
            info.relative_path = "hostile.distcp"
    (folder / "weights" / "hostile.distcp").write_bytes(content)
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"hostile\.distcp"):
        read_all(folder)
    assert not marker.exists()
    assert not (tmp_path.parent / marker.name).exists()


@pytest.mark.parametrize(
    "target",
    ["../../secret", "/etc/passwd", "..", "sub/file", "gone", "n\0ne", "pipe", pytest.param("x" * 300, id="long")],
)
def test_metadata_that_points_elsewhere(tmp_path: Path, target: str) -> None:
    folder = write_checkpoint(tmp_path / "ckpt")
    (tmp_path / "secret").write_bytes(b"x" * 4096)
    os.mkfifo(folder / "weights" / "pipe")
    metadata = read_metadata(folder / "weights")
    for info in metadata.storage_data.values():
        info.relative_path = target
    (folder / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="which is not a file of the checkpoint"):
        read_all(folder)


def test_a_weight_file_that_is_a_link(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt")
    file = folder / "weights" / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="which is not a file of the checkpoint"):
        read_all(folder)
    assert "is a link" in str(damage_of(folder))


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "weights/../../secret"])
def test_a_manifest_that_names_other_files(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "ckpt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    from mixtral_recipes.checkpoints.format.manifest import _seal

    manifest["seal"] = _seal(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the checkpoint" in str(damage_of(folder))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"format": "mixtral-recipes/1", "format": "other"}'])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not (valid JSON|a JSON object)"):
        read_manifest(tmp_path)


def test_a_file_the_manifest_does_not_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ckpt")
    assert damage_of(folder) is None
    (folder / "weights" / "more.distcp").write_bytes(b"x")
    assert "more.distcp: is not listed in the manifest" in str(damage_of(folder))


@pytest.mark.parametrize("kind", ["an object saved by torch", "a plain pickle", "an archive whose pickle calls"])
def test_bin_files(tmp_path: Path, marker: Path, kind: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(ITEMS[kind](marker))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_tensors(path)
    assert not marker.exists()


def test_a_tokenizer_with_code_beside_it(tmp_path: Path, marker: Path) -> None:
    from mixtral_recipes.data.tokenizers import load_tokenizer

    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Tok: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    auto = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", "evil.Tok"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path, error=CheckpointError)
    assert not marker.exists()
