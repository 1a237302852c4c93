"""What a run's settings name is still where it was, and is another."""

from collections.abc import Callable
from pathlib import Path

import pytest

import mixtral_recipes as llm
from mixtral_recipes.checkpoints.format.manifest import write_manifest
from mixtral_recipes.settings.resume import AutoResume, RestoreConfig
from mixtral_recipes.settings.tokenizer import AutoTokenizer
from mixtral_recipes.training.named_files import named_files


def checkpoint(folder: Path, digest: str) -> None:
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "weights/part").write_text(digest)
    write_manifest(folder, "model", tensors={"a": {"dtype": "bfloat16", "shape": [1], "sha256": digest * 64}})


def hugging_face(folder: Path, digest: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    (folder / "model.safetensors").write_text(digest)


@pytest.mark.parametrize(("write", "prefix"), [(checkpoint, ""), (hugging_face, ""), (hugging_face, "hf://")])
def test_other_weights_at_the_start_are_seen(write: Callable[[Path, str], None], prefix: str, tmp_path: Path) -> None:
    place = f"{prefix}{tmp_path / 'base'}"
    start = AutoResume(restore_config=RestoreConfig(path=place))
    assert named_files(llm.MockDataModule(), start, None) == {}
    write(tmp_path / "base", "1")
    before = named_files(llm.MockDataModule(), start, None)
    assert list(before) == [f"the files of {place}"]
    assert named_files(llm.MockDataModule(), start, None) == before
    write(tmp_path / "base", "2")
    assert named_files(llm.MockDataModule(), start, None) != before


def test_another_tokenizer_is_seen(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    before = named_files(llm.MockDataModule(), None, tokenizer)
    assert list(before) == [f"the files of {tmp_path}"]
    (tmp_path / "tokenizer.json").write_text("[]")
    assert named_files(llm.MockDataModule(), None, tokenizer) != before
    assert named_files(llm.MockDataModule(), None, AutoTokenizer("org/name")) == {}
