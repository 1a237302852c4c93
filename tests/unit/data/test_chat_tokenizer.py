"""The tokenizer a run on conversations has: the template that was named, and, where it may grow, the tokens for it."""

from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.data.chat_tokenizer import missing_markers, with_template
from mixtral_recipes.data.modules.chat import ChatDataModule
from mixtral_recipes.data.modules.mixed import MixedDataModule
from mixtral_recipes.data.modules.squad import SquadDataModule
from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.chat_templates import CHATML, MIXTRAL_V1
from mixtral_recipes.data.tokenizers import load_tokenizer, tokenizer_identity
from mixtral_recipes.errors import DataError
from tests.chat_encoding import encode_one

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi <|im_end|> there"}]


def test_markers_become_tokens_where_the_vocabulary_may_grow(tokenizer: Any, tmp_path: Path) -> None:
    assert missing_markers(tokenizer, CHATML) == ["<|im_start|>", "<|im_end|>"]
    grown = with_template(tokenizer, "chatml", grow=True)
    assert len(grown) == len(tokenizer) + 2
    assert grown.eos_token == "<|im_end|>"
    assert missing_markers(grown, CHATML) == []
    assert tokenizer.eos_token == "</s>"  # the one it was made of is as it was
    tokens, learned, *_ = encode_one(ChatEncoder(grown), TALK)
    start, end = grown.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [tokens.count(start), tokens.count(end)] == [2, 2]  # the one that is spelled out is text
    assert [t for t, is_learned in zip(tokens, learned, strict=True) if is_learned][-1] == end
    grown.save_pretrained(tmp_path)
    assert tokenizer_identity(load_tokenizer(tmp_path)) == tokenizer_identity(grown)


def test_markers_stay_text_where_it_may_not(tokenizer: Any) -> None:
    same = with_template(tokenizer, "chatml", grow=False)
    assert (len(same), same.eos_token, same.chat_template) == (len(tokenizer), "</s>", CHATML)
    assert "<|im_start|>" in same.decode(encode_one(ChatEncoder(same), TALK).tokens)


def test_a_tokenizer_without_a_template_gets_the_one_that_is_learned(tokenizer: Any) -> None:
    assert not tokenizer.chat_template
    made = ChatDataModule().tokenizer_for(tokenizer, grow=True)
    assert made.chat_template == ChatEncoder(tokenizer).template == MIXTRAL_V1
    assert ChatDataModule().tokenizer_for(made, grow=True) is made
    assert not tokenizer.chat_template  # the one it was made of is as it was
    mixed = MixedDataModule(sources=[SquadDataModule(), ChatDataModule()])
    assert mixed.tokenizer_for(tokenizer, grow=False).chat_template == MIXTRAL_V1
    mixed = MixedDataModule(sources=[ChatDataModule(), ChatDataModule(chat_template="chatml")])
    assert mixed.tokenizer_for(tokenizer, grow=False).chat_template == CHATML


def test_a_template_that_is_named_becomes_the_tokenizers(tokenizer: Any) -> None:
    assert ChatDataModule(chat_template="mixtral").tokenizer_for(tokenizer, grow=True).eos_token == "</s>"
    mixed = MixedDataModule(sources=[ChatDataModule(), ChatDataModule(chat_template="chatml")])
    assert mixed.tokenizer_for(tokenizer, grow=True).eos_token == "<|im_end|>"
    mixed.sources[0].chat_template = "mixtral"
    with pytest.raises(DataError, match="2 different chat templates"):
        mixed.tokenizer_for(tokenizer, grow=True)
