"""An index is held against its own size and the tokens' before anything is mapped."""

import struct
from pathlib import Path

import numpy as np
import pytest

from mixtral_recipes.data.corpus import write_index
from mixtral_recipes.data.corpus_index import HEADER, check_index
from mixtral_recipes.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXTRAL_RECIPES_HOME", str(tmp_path / "home"))
    lengths = np.array([3, 0, 5], np.int32)
    write_index(tmp_path / "c.idx", lengths, np.dtype(np.uint16))
    (tmp_path / "c.bin").write_bytes(bytes(16))
    return tmp_path / "c"


def changed(corpus: Path, at: int, form: str, *values: int) -> None:
    content = bytearray(corpus.with_suffix(".idx").read_bytes())
    struct.pack_into(form, content, at, *values)
    corpus.with_suffix(".idx").write_bytes(content)


def test_one_that_is_whole(corpus: Path) -> None:
    check_index(corpus)
    index = corpus.with_suffix(".idx")
    index.write_bytes(index.read_bytes() + bytes(3))  # a multimodal corpus's modes
    check_index(corpus)


START = len(HEADER) + 25
DAMAGE = {
    "no header": ((0, "<4s", b"ABCD"), "does not begin with MMIDIDX"),
    "another version": ((9, "<Q", 2), "version 2"),
    "numbers that are no tokens": ((17, "<B", 6), "have type 6"),
    "a count without end": ((18, "<Q", 1 << 62), "4611686018427387904 sequences"),
    "another count of documents": ((26, "<Q", 3), "in 2 documents need"),
    "a length below zero": ((START, "<i", -1), "sequence 0 cannot have -1 tokens"),
    "a length beyond the tokens": ((START + 8, "<i", 2**31 - 1), "has 16 bytes, but c.idx needs"),
    "a place below zero": ((START + 12, "<q", -8), "from byte -8"),
    "a place beyond the tokens": ((START + 12 + 16, "<q", 1 << 40), "has 16 bytes, but c.idx needs"),
    "documents in another order": ((START + 36 + 8, "<q", 3), "do not cover sequences 0 to"),
    "documents beyond the sequences": ((START + 36 + 24, "<q", 9), "do not cover sequences 0 to"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_one_that_is_damaged(corpus: Path, what: str) -> None:
    (at, form, value), told = DAMAGE[what]
    changed(corpus, at, form, value)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError) as caught:
        check_index(corpus)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_cut_off(corpus: Path) -> None:
    corpus.with_suffix(".bin").write_bytes(bytes(15))
    with pytest.raises(DataError, match="has 15 bytes"):
        check_index(corpus)
    index = corpus.with_suffix(".idx")
    for length in (0, 5, 20, 40, index.stat().st_size - 1):
        index.write_bytes(index.read_bytes()[:length])
        with pytest.raises(DataError):
            check_index(corpus)
