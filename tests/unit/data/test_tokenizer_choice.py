"""Whichever way a recipe names its tokenizer, the same one is found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mixtral_recipes as llm
from mixtral_recipes.data.tokenizer_choice import check_place, chosen_tokenizer
from mixtral_recipes.errors import DataError, RecipeError

TINY = "embedded://mixtral_tiny"


@pytest.mark.parametrize(
    "named",
    [
        TINY,
        llm.AutoTokenizer(TINY),
        llm.get_nmt_tokenizer("huggingface", TINY),
        llm.get_nmt_tokenizer(library="sentencepiece", tokenizer_model=TINY),
        chosen_tokenizer(TINY),
    ],
    ids=["name", "AutoTokenizer", "huggingface", "sentencepiece", "itself"],
)
def test_every_way_gives_the_same_tokens(named: Any) -> None:
    assert chosen_tokenizer(named)("Who wrote it?")["input_ids"] == chosen_tokenizer(TINY)("Who wrote it?")["input_ids"]


def test_none_where_none_is_named() -> None:
    assert chosen_tokenizer(None) is None
    null = llm.get_nmt_tokenizer(library="null", vocab_size=77)
    assert chosen_tokenizer(null) is None
    data = llm.MockDataModule(seq_length=200, tokenizer=null, num_train_samples=2)
    drawn = data.datasets(None)["train"][0]["tokens"]
    assert 60 < drawn.max() < 77


def test_gpt2s_two_files(tmp_path: Path) -> None:
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({"<|endoftext|>": 0, "h": 1, "i": 2, "hi": 3}))
    merges.write_text("#version: 0.2\nh i\n")
    named = llm.get_nmt_tokenizer("megatron", "GPT2BPETokenizer", vocab_file=str(vocab), merges_file=str(merges))
    assert chosen_tokenizer(named)("hi")["input_ids"] == [3]
    vocab.unlink()
    with pytest.raises(DataError, match=r"vocab\.json: no such file"):
        chosen_tokenizer(named)


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}!")
    for template in (str(tmp_path / "chat.jinja"), "{{ messages[0].content }}!"):
        tokenizer = chosen_tokenizer(llm.AutoTokenizer(TINY, chat_template=template))
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


@pytest.mark.parametrize("look", [chosen_tokenizer, check_place])
def test_what_is_no_tokenizer_is_refused(look: Callable[[Any], Any]) -> None:
    with pytest.raises(RecipeError, match="tokenizer=3 is not a tokenizer"):
        look(3)
    with pytest.raises(RecipeError, match="library='byte-level'"):
        llm.get_nmt_tokenizer("byte-level")
    with pytest.raises(RecipeError, match="needs model_name"):
        llm.get_nmt_tokenizer("huggingface")


def test_a_name_that_is_not_given_is_not_this_folder() -> None:
    with pytest.raises(DataError, match=r"tokenizer hf://: neither a folder or file that exists nor a Hub id"):
        check_place("hf://")
