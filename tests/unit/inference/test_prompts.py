"""A file of prompts is read line by line, whatever wrote it."""

import io
import json
from pathlib import Path

import pytest

from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.evaluation.asked import prompts_of
from mixtral_recipes.inference.prompts import read


def test_a_mark_at_the_beginning_and_rare_line_separators_are_no_part_of_the_lines(tmp_path: Path) -> None:
    file, odd = tmp_path / "prompts.jsonl", "a\u2028b\x85c"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": odd}, ensure_ascii=False).encode() + b"\r\nplain\r\n\r\n")
    assert read(file) == [odd, "plain"]


def test_nemos_input_dataset_is_read_the_same_way(tmp_path: Path) -> None:
    file, odd = tmp_path / "questions.jsonl", "a\u2028b"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"input": odd}, ensure_ascii=False).encode() + b"\n\n")
    assert prompts_of(None, file) == [odd]
    assert prompts_of(("a", "b"), None) == ["a", "b"]
    with pytest.raises(RecipeError, match=r"prompts='Where\?' is one text; write prompts=\[\.\.\.\]"):
        prompts_of("Where?", None)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_no_text_is_refused(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Why \xff?\n"), "utf-8", errors))
    with pytest.raises(DataError, match="-: cannot be read"):
        read(Path("-"))
