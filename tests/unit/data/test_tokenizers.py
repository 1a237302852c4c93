"""One loader for every command: each kind of place gives the same tokenizer, and errors are the asker's."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from mixtral_recipes.data.tokenizers import load_tokenizer, text_identity, tokenizer_identity
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import CheckpointError, DataError

TEXT = "Where are  two spaces?\nHere: 中文"


@pytest.fixture(scope="module")
def model_file() -> Path:
    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def test_a_folder_a_checkpoint_and_the_package_agree(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "checkpoint" / "weights").mkdir(parents=True)
    context = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "checkpoint" / "context")
    expected = tokenizer.encode(TEXT)
    for source in (context, tmp_path / "checkpoint", str(context), f"hf://{context}"):
        assert load_tokenizer(source).encode(TEXT) == expected


def test_a_sentencepiece_file_and_its_folder_agree_and_the_folders_template_wins(
    model_file: Path, tmp_path: Path
) -> None:
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    mixtral = load_tokenizer("mistral://mixtral-8x7b")
    assert load_tokenizer(model_file).encode(TEXT) == mixtral.encode(TEXT) == load_tokenizer(tmp_path).encode(TEXT)
    assert load_tokenizer(tmp_path).chat_template == mixtral.chat_template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the configuration"}))
    assert load_tokenizer(tmp_path).chat_template == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("from its file")
    assert load_tokenizer(tmp_path).chat_template == "from its file"


@pytest.mark.parametrize("error", [DataError, CheckpointError])
def test_who_asks_gets_an_error_of_its_kind(error: type[Any], tmp_path: Path) -> None:
    with pytest.raises(error, match=rf"^{tmp_path}: no tokenizer can be loaded \("):
        load_tokenizer(tmp_path, error=error)


def _changed(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Any:
    """The embedded tokenizer with its tokenizer.json changed."""
    folder = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "changed")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def _reverse_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    ordinary = sorted(number for number in vocabulary.values() if number >= 300)
    new = dict(zip(ordinary, reversed(ordinary), strict=True))
    content["model"]["vocab"] = {piece: new.get(number, number) for piece, number in vocabulary.items()}


def _swap_first_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[:40] = reversed(merges[:40])


def _drop_a_merge(content: dict[str, Any]) -> None:
    del content["model"]["merges"][-1]


def _add_a_token(content: dict[str, Any]) -> None:
    last = content["added_tokens"][-1]
    content["added_tokens"].append({**last, "id": len(content["model"]["vocab"]), "content": "<|im_end|>"})


@pytest.mark.parametrize("change", [_reverse_ids, _swap_first_merges, _drop_a_merge, _add_a_token])
def test_whatever_changes_a_tokens_meaning_changes_the_identity(
    change: Callable[[dict[str, Any]], None], tmp_path: Path, tokenizer: Any
) -> None:
    other = _changed(tmp_path, change)
    assert tokenizer_identity(other) != tokenizer_identity(tokenizer)
    assert text_identity(other) != text_identity(tokenizer)


def test_the_identity_is_of_what_a_tokenizer_does_not_of_its_files(model_file: Path, tmp_path: Path) -> None:
    original = load_tokenizer(model_file)
    original.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    again.pad_token = again.eos_token
    again(["a", "two words"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    assert tokenizer_identity(again) == tokenizer_identity(original) == tokenizer_identity(load_tokenizer(model_file))


def test_a_chat_template_is_part_of_the_identity_and_no_matter_of_plain_text(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_identity(other) != tokenizer_identity(tokenizer)
    assert text_identity(other) == text_identity(tokenizer)
    other.eos_token = "<s>"
    assert text_identity(other) != text_identity(tokenizer)
