"""What is prepared once is believed by content: of its sources, and its own."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mixtral_recipes.data import cache
from mixtral_recipes.data.batches.packing import PackedDataset
from mixtral_recipes.data.cache import content_hash, prepared, sampled_hash, save_array
from mixtral_recipes.data.corpus import Encoder, prepare_corpus
from mixtral_recipes.system import remembered as memory


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(memory, "_SETTLED_AFTER_S", -1.0)


def rewrite(path: Path, content: bytes) -> None:
    """Other bytes under the same name, size and modification time."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_file_rewritten_with_its_time_kept_has_another_hash(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"one")
    first = content_hash(path)
    assert content_hash(path) == first
    rewrite(path, b"two")
    assert content_hash(path) != first


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: rewrite(file, b"tokenz"),
        lambda file: file.write_bytes(b"tok"),
        lambda file: file.unlink(),
        lambda file: (file.parent / "contents.json").write_text("{"),
        lambda file: (file.parent / "contents.json").write_text("[]"),
        lambda file: (rewrite(file, b"tokenz"), (file.parent / "contents.json").write_text("{}")),
        lambda file: (file.parent / "made_from.json").write_text("[2]"),
    ],
    ids=["other bytes", "cut", "gone", "cut hashes", "other hashes", "no hashes", "made from something else"],
)
def test_what_was_prepared_and_damaged_is_made_again(
    damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []

    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "inner").mkdir()
        (folder / "tokens.bin").write_bytes(b"tokens")
        (folder / "inner" / "starts").write_bytes(b"0")

    folder = prepared("samples", [1], build)
    assert prepared("samples", [1], build) == folder
    assert len(made) == 1
    damage(folder / "tokens.bin")
    assert prepared("samples", [1], build) == folder
    assert (folder / "tokens.bin").read_bytes() == b"tokens"
    assert len(made) == 2
    assert "is being rebuilt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"\xff", b"12", b"x" * 90])
def test_a_damaged_memory_of_a_file_is_not_believed(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"one")
    known = content_hash(path)
    (memo,) = (tmp_path / "home" / "data" / "hashes").iterdir()
    memo.write_bytes(damage)
    assert content_hash(path) == known


def test_an_array_that_finds_no_room_is_told(tmp_path: Path) -> None:
    for array in (np.arange(10, dtype=np.int64), np.empty(0, np.int32)):
        save_array(tmp_path / "array.npy", array)
        loaded = np.load(tmp_path / "array.npy")
        assert loaded.dtype == array.dtype
        assert np.array_equal(loaded, array)
        with pytest.raises(OSError, match="No space left"):
            save_array(Path("/dev/full"), array)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of the code that reads data."""
    file = tmp_path / "code" / "data" / "records" / "parse.py"
    file.parent.mkdir(parents=True)
    file.write_text("good = False")
    monkeypatch.setattr(cache, "_PACKAGE", tmp_path / "code")
    cache.code_version.cache_clear()
    yield file
    cache.code_version.cache_clear()


def reads_otherwise(code: Path) -> None:
    """What an upgrade does."""
    code.write_text("good = True")
    cache.code_version.cache_clear()


def test_code_that_reads_data_otherwise_makes_everything_anew(code: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "samples").write_text(code.read_text())

    assert (prepared("samples", [1], build) / "samples").read_text() == "good = False"
    reads_otherwise(code)
    assert not cache.is_prepared("samples", [1])
    assert (prepared("samples", [1], build) / "samples").read_text() == "good = True"


@pytest.mark.parametrize("name", ["__init__.py", "data/corpus.py", "data/records/parse.py", "system/files.py"])
def test_the_code_that_counts_is_the_release_what_reads_data_and_what_that_builds_on(name: str, code: Path) -> None:
    assert (Path(cache.__file__).parents[1] / name).is_file()
    before = cache.code_version()
    file = code.parents[2] / name
    file.parent.mkdir(exist_ok=True)
    reads_otherwise(file)
    assert cache.code_version() != before


def test_packs_that_were_damaged_are_made_again(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 9, 100_000)  # fewer are packed anew each time

    def samples() -> np.ndarray:
        return PackedDataset(range(len(lengths)), lengths, 8).packs.samples

    first = np.array(samples())
    (file,) = (tmp_path / "home").rglob("samples.npy")
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    rewrite(file, bytes(content))
    np.testing.assert_array_equal(samples(), first)


class Letters:
    """A tokenizer whose tokens are bytes; it fails on texts that hold a word."""

    def __init__(self, stops_at: str = "") -> None:
        self.stops_at = stops_at

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self.stops_at and any(self.stops_at in text for text in texts):
            raise InterruptedError
        return [list(text.encode()) for text in texts]

    def fingerprint(self) -> str:
        return "letters"


def test_parts_of_a_stopped_run_are_not_those_of_a_rewritten_input(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "old"}\n{"text": "end"}\n')
    parts = {"part_bytes": 8}
    with pytest.raises(InterruptedError):
        prepare_corpus([path], tmp_path / "corpus", Encoder(Letters("end"), None, None, 256, "letters"), **parts)  # pyright: ignore[reportArgumentType]
    rewrite(path, b'{"text": "new"}\n{"text": "end"}\n')
    made = prepare_corpus([path], tmp_path / "corpus", Encoder(Letters(), None, None, 256, "letters"), **parts)  # pyright: ignore[reportArgumentType]
    assert made.reused_parts == 0
    assert np.fromfile(tmp_path / "corpus.bin", np.uint16).astype(np.uint8).tobytes() == b"newend"


def test_parts_of_a_stopped_run_are_not_those_of_other_code(tmp_path: Path, code: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "old"}\n{"text": "end"}\n')
    reused: list[int] = []
    for upgrade in (False, True):
        prefix = tmp_path / f"corpus{upgrade}"
        with pytest.raises(InterruptedError):
            prepare_corpus([path], prefix, Encoder(Letters("end"), None, None, 256, "letters"), part_bytes=8)  # pyright: ignore[reportArgumentType]
        if upgrade:
            reads_otherwise(code)
        made = prepare_corpus([path], prefix, Encoder(Letters(), None, None, 256, "letters"), part_bytes=8)  # pyright: ignore[reportArgumentType]
        reused.append(made.reused_parts)
    assert reused[0]
    assert not reused[1]


def test_a_large_file_is_known_by_its_size_and_stretches_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SAMPLED_ABOVE", 100)
    monkeypatch.setattr(cache, "_SAMPLES", 5)
    monkeypatch.setattr(cache, "_SAMPLE_BYTES", 10)
    path = tmp_path / "corpus.bin"
    path.write_bytes(bytes(1000))
    whole = sampled_hash(path)
    for changed in (0, 999, 500):
        content = bytearray(1000)
        content[changed] = 1
        path.write_bytes(content)
        assert sampled_hash(path) != whole
    path.write_bytes(bytes(1001))
    assert sampled_hash(path) != whole
