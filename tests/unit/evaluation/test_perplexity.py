"""Windows over a document, and what counts as one."""

import json
from pathlib import Path

import pytest

from mixtral_recipes.errors import DataError
from mixtral_recipes.evaluation.perplexity import documents, windows


@pytest.mark.parametrize(("length", "window", "stride"), [(1, 4, 2), (2, 4, 2), (10, 4, 2), (11, 4, 3), (9, 16, 8)])
def test_each_token_but_the_first_is_judged_once_after_what_came_before(length: int, window: int, stride: int) -> None:
    tokens = list(range(length))
    judged: list[int] = []
    for ending in windows(tokens, window, stride):
        assert 0 < ending.judged < len(ending.tokens) <= window
        judged += ending.tokens[-ending.judged :]
    assert judged == tokens[1:]


def test_a_plain_file_is_one_document_and_records_are_one_each(tmp_path: Path) -> None:
    plain, records, chat = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    plain.write_text("One.\n\nTwo.")
    records.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("One.", "Two.")))
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    assert list(documents(plain)) == ["One.\n\nTwo."]
    assert list(documents(records)) == ["One.", "Two."]
    with pytest.raises(DataError, match="perplexity is measured on plain text"):
        list(documents(chat))
    plain.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        list(documents(plain))
