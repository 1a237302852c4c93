"""The engine: rows from files to files, checked and hashed on the way."""

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtral_recipes.checkpoints.format import output, reading
from mixtral_recipes.checkpoints.format.rows import ITEM_BYTES, TORCH_NAMES, Extent, is_finite
from mixtral_recipes.checkpoints.format.stream import Part, Record, Run, Stream, lay_out
from mixtral_recipes.errors import CheckpointError


def file_of(path: Path, nbytes: int, *, cached: bool = True) -> bytes:
    """A file of finite bf16 numbers; without ``cached`` the page cache has forgotten it."""
    numbers = np.random.default_rng(1).integers(0, 0x7F00, nbytes // 2, dtype=np.uint16)
    path.write_bytes(numbers.tobytes())
    if not cached:
        with path.open() as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return numbers.tobytes()


@pytest.mark.parametrize("cached", [True, False])
def test_reads_any_stretch(tmp_path: Path, cached: bool) -> None:
    data = file_of(tmp_path / "file", 9 << 20, cached=cached)
    random = np.random.default_rng(0)
    for _ in range(30):
        start = int(random.integers(len(data)))
        out = bytearray(int(random.integers(1, len(data) - start + 1)))
        reading.read_exactly(str(tmp_path / "file"), start, memoryview(out))
        assert out == data[start : start + len(out)]
    with pytest.raises(CheckpointError, match="truncated"):
        reading.read_exactly(str(tmp_path / "file"), len(data) - 10, memoryview(bytearray(11)))
    reading.close_inputs()


@pytest.mark.parametrize("direct", [True, False])
def test_neighbouring_runs_make_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Stretches that begin and end inside the same block, written at the same time, with and without O_DIRECT."""
    if not direct:
        monkeypatch.setattr(output, "_open_direct", lambda path: None)
    data = file_of(tmp_path / "in", 11 << 20)
    cuts = [0, 2, 4094, 4096, 10_000, 10_002, 5 << 20, (9 << 20) + 6, len(data)]
    records = []
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        extent = Extent(str(tmp_path / "in"), start, "BF16", (stop - start) // 2, 2)
        part = Part(f"t{number}", extent, 0, extent.rows)
        records.append(Record(b"<%d" % number, [part], b">", "BF16", stop - start, align=(1, 64)[number % 2]))
    lay_out(records)
    for record in records:
        record.offset += 7  # as behind a file's head
    for per_run in (1, 3):
        groups = [records[i : i + per_run] for i in range(0, len(records), per_run)]
        runs = [Run(tmp_path / f"out{per_run}", group, start=group[0].offset) for group in groups]
        stream = Stream(4)
        stream.write(runs)
        wanted = bytearray(records[-1].offset + records[-1].length)
        for record, start, stop in zip(records, cuts, cuts[1:], strict=False):
            text = record.prefix + data[start:stop] + record.suffix
            wanted[record.offset : record.offset + len(text)] = text
            assert stream.digests[record.parts[0].name] == hashlib.sha256(data[start:stop]).hexdigest()
        written = (tmp_path / f"out{per_run}").read_bytes()
        assert written == bytes(wanted)
        for run in runs:
            at = run.start
            for length, digest in run.hashes:
                assert hashlib.sha256(written[at : at + length]).hexdigest() == digest
                at += length
            assert at == run.stop


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
def test_casts_as_torch_does(tmp_path: Path, source: str, target: str) -> None:
    numbers = torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    stored = numbers.to(getattr(torch, TORCH_NAMES[source]))
    (tmp_path / "in").write_bytes(stored.view(torch.uint8).numpy().tobytes())
    item, wide = ITEM_BYTES[source], ITEM_BYTES[target]
    extent = Extent(str(tmp_path / "in"), 0, source, 1000, 70 * item)
    run = Run(tmp_path / "out", [Record(parts=[Part("t", extent, 0, 1000)], dtype=target, nbytes=70_000 * wide)])
    Stream(1).write([run])
    expected = stored.to(getattr(torch, TORCH_NAMES[target]))
    assert (tmp_path / "out").read_bytes() == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_finds_nan_and_inf_and_nothing_else(dtype: str) -> None:
    kind = getattr(torch, TORCH_NAMES[dtype])
    largest = torch.finfo(kind).max
    fine = torch.tensor([0.0, -0.0, 1.0, -1.0, largest, -largest, torch.finfo(kind).tiny], dtype=kind)
    assert is_finite(memoryview(fine.view(torch.uint8).numpy()), dtype)
    assert is_finite(memoryview(b""), dtype)
    for bad in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for place in range(len(fine)):
            spoiled = fine.clone()
            spoiled[place] = bad
            assert not is_finite(memoryview(spoiled.view(torch.uint8).numpy()), dtype)


def test_one_failure_stops_all(tmp_path: Path) -> None:
    file_of(tmp_path / "in", 8 << 20)
    good = Extent(str(tmp_path / "in"), 0, "BF16", 4 << 20, 2)
    bad = Extent(str(tmp_path / "in"), 8 << 20, "BF16", 10, 2)
    runs = [
        Run(tmp_path / f"out{number}", [Record(parts=[Part("t", extent, 0, extent.rows)], nbytes=extent.rows * 2)])
        for number, extent in enumerate([good, bad, good, good])
    ]
    with pytest.raises(CheckpointError, match="truncated"):
        Stream(2).write(runs)
