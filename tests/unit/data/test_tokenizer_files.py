"""A tokenizer's size told from its files is the loaded one's."""

import json
import shutil
from pathlib import Path

import mistral_common
import pytest

from mixtral_recipes.data.tokenizer_files import settings, size_on_disk
from mixtral_recipes.data.tokenizers import load_tokenizer, vocabulary_size
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import DataError

MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def _folder(kind: str, folder: Path) -> Path:
    if kind == "checkpoint":
        shutil.copytree(resolve("embedded://mixtral_tiny"), folder / "context")
    elif kind == "sentencepiece":
        shutil.copy(MODEL, folder / "tokenizer.model")
        (folder / "added_tokens.json").write_text('{"<|b|>": 32001, "<|a|>": 32000}')
    elif kind == "tekken":
        content = json.loads((MODEL.parent / "tekken_240911.json").read_text())
        content["vocab"], content["config"]["default_vocab_size"] = content["vocab"][:300], 1300
        (folder / "tekken.json").write_text(json.dumps(content))
    else:
        shutil.copytree(resolve("embedded://mixtral_tiny"), folder, dirs_exist_ok=True)
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"].append({**content["added_tokens"][-1], "id": 1999, "content": "<|a|>"})
        (folder / "tokenizer.json").write_text(json.dumps(content))
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"added_tokens_decoder": {"1999": {"content": "<|a|>"}, "2000": {"content": "<|b|>", **flags}}})
        )
    return folder


@pytest.mark.parametrize(
    ("kind", "size"), [("checkpoint", 1999), ("sentencepiece", 32002), ("tekken", 1300), ("added", 2001)]
)
def test_a_folder(kind: str, size: int, tmp_path: Path) -> None:
    folder = _folder(kind, tmp_path)
    assert size_on_disk(folder) == vocabulary_size(load_tokenizer(folder)) == size


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ("embedded://mixtral_tiny", 1999),
        ("mistral://mixtral-8x7b", 32000),
        ("mistral://mixtral-8x22b-instruct", 32768),
        (str(MODEL), 32000),
        ("org/name", None),
        ("hf://org/name", None),
        ("mistral://unheard-of", None),
    ],
)
def test_a_name(source: str, size: int | None) -> None:
    assert size_on_disk(source) == size


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match=r"tokenizer\.json is a Git LFS pointer of 43 bytes"):
        size_on_disk(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {"content": "a"}}}',
            "a name in added_tokens_decoder=['x']",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": [1]}',
            "added_tokens_decoder=[1] is not allowed; it must be a table",
        ),
        ("added_tokens.json", '{"a": true}', "a=True is not allowed; it must be a whole number"),
        ("added_tokens.json", '{"a": 1000000000000}', "a=1000000000000 is not allowed"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "1"}}}', "model.vocab"),
        ("tokenizer.json", '{"added_tokens": [{"id": -1, "content": "a"}]}', "added_tokens[0].id=-1 is not allowed"),
        ("tekken.json", '{"config": {"default_vocab_size": 1e9}}', "config.default_vocab_size"),
    ],
)
def test_numbers_of_tokens_that_are_none(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        settings(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert told in str(caught.value)
