"""Text is shown as it comes, up to a stop text, and never a part of a character."""

import random
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, normalizers
from transformers import PreTrainedTokenizerFast

from mixtral_recipes import embedded
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.inference.text import GrowingText, TokenTexts


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return bytes(tokens).decode(errors="replace")


def shown(text: str, *stop: str) -> tuple[list[str], GrowingText]:
    found = GrowingText(Bytes(), stop)
    pieces = []
    for byte in text.encode():
        pieces.append(found.add(byte))
        if found.stopped:
            break
    return [*pieces, found.rest()], found


def test_pieces_make_up_the_text() -> None:
    pieces, found = shown("größer als 10 €\n")
    assert "".join(pieces) == found.shown == "größer als 10 €\n"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stop_text_ends_it_and_is_not_shown() -> None:
    pieces, found = shown("yes.\nUser: more", "\nUser:", "###")
    assert found.stopped
    assert "".join(pieces) == found.shown == "yes."


def test_what_only_began_like_a_stop_text_is_shown_at_the_end() -> None:
    pieces, found = shown("a ##", "###")
    assert not found.stopped
    assert "".join(pieces) == "a ##"


def sentencepiece_like() -> Any:
    """A tokenizer as Mixtral's: spaces are part of words, and what it does not know is bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a", "\u2581b"]
    model = tokenizers.models.BPE(
        {word: number for number, word in enumerate(words)}, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True
    )
    found = tokenizers.Tokenizer(model)
    found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece"])
def test_any_tokens_come_piece_by_piece_as_in_one(kind: str) -> None:
    embedded_one = load_tokenizer(embedded.resolve("embedded://mixtral_tiny"))
    tokenizer = embedded_one if kind == "byte level" else sentencepiece_like()
    words = [*(number for text, number in tokenizer.get_vocab().items() if not text.startswith("<0x")), 1, 2]
    numbers = random.Random(3)
    for _ in range(200):
        tokens = [*numbers.choices(words, k=30), *tokenizer("größer € 猫")["input_ids"], *numbers.choices(words, k=3)]
        found = GrowingText(tokenizer, ())
        pieces = [found.add(token) for token in tokens]
        assert "".join([*pieces, found.rest()]) == tokenizer.decode(tokens, skip_special_tokens=True)
        found = GrowingText(tokenizer, (), continues=True)
        pieces = [found.add(token) for token in tokens]
        behind = tokenizer("a", add_special_tokens=False)["input_ids"]
        assert "".join(["a", *pieces, found.rest()]) == tokenizer.decode([*behind, *tokens], skip_special_tokens=True)


@pytest.mark.parametrize("watched", [True, False])
def test_what_continues_a_text_keeps_its_space(watched: bool) -> None:
    tokenizer = load_tokenizer("mistral://mixtral-8x7b")
    prompt, whole = "The capital of France is", "The capital of France is Paris, not Rome."
    tokens = tokenizer(whole)["input_ids"][len(tokenizer(prompt)["input_ids"]) :]
    for continues, space in ((True, " "), (False, "")):
        found = GrowingText(tokenizer, (" Rome",), watched=watched, continues=continues)
        pieces = [found.add(token) for token in tokens if not found.stopped]
        assert "".join([*pieces, found.rest()]) == f"{space}Paris, not" + ("" if watched else " Rome.")


def test_what_ends_a_text_is_not_part_of_it_even_where_it_is_not_special() -> None:
    tokenizer = load_tokenizer("embedded://mixtral_tiny")
    tokenizer.add_tokens(["<|im_end|>"])
    tokens = tokenizer("Yes.<|im_end|>", add_special_tokens=False)["input_ids"]
    found = GrowingText(tokenizer, (), ends=frozenset({tokens[-1]}))
    assert "".join([*map(found.add, tokens), found.rest()]) == "Yes."


def test_a_long_text_is_not_decoded_again_for_each_token() -> None:
    class Counting(Bytes):
        most = 0

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            self.most = max(self.most, len(tokens))
            return super().decode(tokens, skip_special_tokens)

    tokenizer = Counting()
    found = GrowingText(tokenizer, ("###",))
    for byte in ("größer € " * 50).encode():
        found.add(byte)
    assert tokenizer.most < 10
    assert found.shown == ("größer € " * 50)[:-2]


def test_a_token_alone_has_its_space_its_name_and_its_bytes() -> None:
    tokenizer = sentencepiece_like()
    texts = TokenTexts(tokenizer)
    number = tokenizer.get_vocab().__getitem__
    assert texts(number("\u2581a")) == (" a", [32, 97])
    assert texts(number("a")) == ("a", [97])
    assert texts(number("</s>")) == ("</s>", [*b"</s>"])
    assert texts(number("<0x41>")) == ("A", [0x41])
    assert texts(number("<0xE2>"))[1] == [0xE2]
    assert texts(number("<0xE2>"))[0] == "\N{REPLACEMENT CHARACTER}"


def test_tokens_of_a_byte_level_tokenizer_make_up_their_text() -> None:
    tokenizer = load_tokenizer(embedded.resolve("embedded://mixtral_tiny"))
    texts = TokenTexts(tokenizer)
    text = "Where is Paris , then?\n\n2 + 2"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(texts(token)[0] for token in tokens) == text
    assert bytes(byte for token in tokens for byte in texts(token)[1] or ()) == text.encode()
    part = tokenizer("\N{GREEK SMALL LETTER OMEGA}", add_special_tokens=False)["input_ids"][0]
    assert texts(part) == ("\N{REPLACEMENT CHARACTER}", None)
