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


def test_a_folder_may_be_start_and_tokenizer(tmp_path: Path) -> None:
    start, tokenizer = AutoResume(restore_config=RestoreConfig(path=str(tmp_path))), AutoTokenizer(str(tmp_path))
    hugging_face(tmp_path, "1")
    (tmp_path / "tokenizer.json").write_text("{}")
    seen = [named_files(llm.MockDataModule(), start, tokenizer)]
    for change in (lambda: hugging_face(tmp_path, "2"), lambda: (tmp_path / "tokenizer.json").write_text("[]")):
        change()
        seen.append(named_files(llm.MockDataModule(), start, tokenizer))
    assert len({str(each) for each in seen}) == 3


def test_a_template_may_be_a_file_or_text(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}")
    seen = named_files(llm.MockDataModule(), None, AutoTokenizer("org/name", chat_template=str(template)))
    assert list(seen) == [f"the files of {template}"]
    long = "{{ messages }}" * 1000  # no name of a file
    assert named_files(llm.MockDataModule(), None, AutoTokenizer("org/name", chat_template=long)) == {}
