"""Pointers in the place of files, wherever a file is read from a folder of somebody's (models: importers/hf)."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_recipes.data.corpus_paths import corpus_at
from mixtral_recipes.data.records.open import open_source
from mixtral_recipes.data.records.text_parts import split_into_parts
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import MixtralRecipesError
from mixtral_recipes.reports.record import read_run
from mixtral_recipes.system.json_files import read_object
from mixtral_recipes.system.toml_files import read_table
from mixtral_recipes.system.yaml_files import load_plain

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 4934430\n"
READERS: dict[str, Callable[[Path], object]] = {
    "train.jsonl": open_source,
    "train.parquet": lambda path: open_source(path.parent),
    "corpus.txt": lambda path: split_into_parts(path, "text", 1000),
    "corpus.csv": lambda path: split_into_parts(path, "text", 1000),
    "mine.idx": corpus_at,
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "tokenizer.model": load_tokenizer,
    "recipe.yaml": lambda path: load_plain(path, MixtralRecipesError),
    "clusters.toml": lambda path: read_table(path, MixtralRecipesError),
    "run.json": lambda path: read_object(path, MixtralRecipesError),
    "metrics.jsonl": lambda path: read_run(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_a_pointer_for_what_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(MixtralRecipesError, match=f"{name} is a Git LFS pointer of 132 bytes.*git lfs pull"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_a_pipe(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(MixtralRecipesError, match=f"{name}|no training split"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("text", ["/annex/objects/SHA256E-s104--abc.jsonl\n", "../.git/annex/objects/x/y/z\n"])
def test_git_annex(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(MixtralRecipesError, match=r"git-annex pointer.*git annex get train\.jsonl"):
        open_source(tmp_path / "train.jsonl")


def test_a_file_that_only_speaks_of_git_lfs_is_read(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(f"The first line of a pointer is:\n{POINTER}")
    assert len(split_into_parts(tmp_path / "corpus.txt", "text", 1000)) == 1
