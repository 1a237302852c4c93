"""One loader for every command: each kind of place gives the same tokenizer, and errors are the asker's."""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from mixtral_recipes.data.tokenizers import load_tokenizer
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
