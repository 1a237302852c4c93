"""A file of prompts is read line by line, whatever wrote it."""

import io
import json
from pathlib import Path
from typing import Any, cast

import pytest

from mixtral_recipes import embedded
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.evaluation.from_python import prompts_of
from mixtral_recipes.inference.prompts import read, tokens


def test_a_mark_at_the_beginning_and_rare_line_separators_are_no_part_of_the_lines(tmp_path: Path) -> None:
    file, odd = tmp_path / "prompts.jsonl", "a\u2028b\x85c"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": odd}, ensure_ascii=False).encode() + b"\r\nplain\r\n\r\n")
    assert read(file) == [odd, "plain"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_may_hold_them_in_a_list(tmp_path: Path, indent: int | None) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"prompt": "a"}, {"prompt": ""}], indent=indent))
    assert read(file) == ["a", ""]
    for text, said in (('["a"]', "1: is a text, not an object"), ("[]", " holds no prompt")):
        file.write_text(text)
        with pytest.raises(DataError, match=f"prompts.json:?{said}"):
            read(file)


def test_nemos_input_dataset_is_read_the_same_way(tmp_path: Path) -> None:
    file, odd = tmp_path / "questions.jsonl", "a\u2028b"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"input": odd}, ensure_ascii=False).encode() + b"\n\n")
    assert prompts_of(None, file) == [odd]
    assert prompts_of(("a", "b"), None) == ["a", "b"]
    with pytest.raises(RecipeError, match=r"prompts='Where\?' is a single text; pass a list of texts"):
        prompts_of("Where?", None)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_that_is_no_text_is_refused(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Why \xff?\n"), "utf-8", errors))
    with pytest.raises(DataError, match="-: cannot be read"):
        read(Path("-"))


@pytest.mark.parametrize("field", ["prompt", "input"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"FIELD": "a\\ud800"}', r"'FIELD' contains half of a UTF-16 pair \(\\ud800\)"),
        ('{"FIELD": ' + "[" * 100_000, "nested too deeply"),
        ('{"FIELD": null}', "'FIELD' is missing"),
        ('{"FIELD": 5}', "'FIELD' is int, not text"),
        ('{"other": "a"}', "'FIELD' is missing"),
        ('{"FIELD": "a", "FIELD": "b"}', "field 'FIELD' appears twice"),
    ],
)
def test_a_line_without_a_prompt_is_named(line: str, said: str, field: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"{field}": ""}}\n' + line.replace("FIELD", field))
    with pytest.raises(DataError, match=":2: " + said.replace("FIELD", field)):
        read(file) if field == "prompt" else prompts_of(None, file)


def test_what_holds_no_prompt_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(" \n")
    with pytest.raises(DataError, match="holds no prompt"):
        prompts_of(None, file)
    with pytest.raises(RecipeError, match=r"the prompt '5' is a int"):
        prompts_of(cast(Any, ["a", 5]), None)


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_no_text_is_refused(chat: bool) -> None:
    """A word of the command line whose bytes are not UTF-8, or half of a pair from Python."""
    tokenizer = load_tokenizer(embedded.resolve("embedded://mixtral_tiny"))
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(DataError, match=r"a prompt holds \\udce9, which is half of a UTF-16 pair"):
        tokens(tokenizer, "caf\udce9", chat=chat)
