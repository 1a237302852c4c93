"""Data that is still where it was, and is another."""

from pathlib import Path

import pytest

import mixtral_recipes as llm
from mixtral_recipes.data.contents import contents


@pytest.mark.parametrize("name", ["all.jsonl", "folder/training.jsonl", "corpus.bin", "corpus.idx"])
def test_what_changes_at_a_place_changes_its_hash(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    for each in ("all.jsonl", "folder/training.jsonl", "folder/README.md", "corpus.bin", "corpus.idx"):
        (tmp_path / each).write_text("one")
    places = [tmp_path / "all.jsonl", tmp_path / "folder", tmp_path / "corpus"]
    before = contents(places)
    assert set(before) == {f"the files of {place}" for place in places}
    assert contents(places) == before
    (tmp_path / name).write_text("two")
    after = contents(places)
    assert [key for key in before if before[key] != after[key]] == [
        f"the files of {tmp_path / name.partition('/')[0].partition('.b')[0].partition('.i')[0]}"
    ]


def test_what_is_elsewhere_is_not_looked_at(tmp_path: Path) -> None:
    assert contents(["rajpurkar/squad", "hf://org/name", tmp_path / "none.jsonl", "embedded://none"]) == {}
    assert set(contents(["embedded://squad"])) == {"the files of embedded://squad"}


def test_every_module_names_its_places(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for place in places:
        Path(place).write_text('{"input": "a", "output": "b"}\n')
    one, other = (llm.FineTuningDataModule(dataset_root=place) for place in places)
    assert one.places() == places[:1]
    assert llm.MixedDataModule(sources=[one, other]).places() == places
    assert llm.PreTrainingDataModule(paths=[30, "c", 70, "d"]).places() == ["c", "d"]
    assert llm.PreTrainingDataModule(paths={"train": ["c"], "validation": "d", "test": None}).places() == ["c", "d"]
    assert llm.MockDataModule().places() == []
