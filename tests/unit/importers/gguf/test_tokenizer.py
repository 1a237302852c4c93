"""Tokenizers as llama.cpp takes them, and chat templates as Ollama does."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest

from mixtral_recipes import embedded
from mixtral_recipes.data.records.chat_templates import CHATML, MIXTRAL_V1, MIXTRAL_V3, NAMED
from mixtral_recipes.data.tokenizer_files import mistral_file
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.gguf.modelfile import modelfile, turns_of
from mixtral_recipes.importers.gguf.tokenizer import vocabulary_of, without_marks

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral 8x22B-Instruct's file: pieces, bytes, controls."""
    file = mistral_file("mixtral-8x22b-instruct")
    assert file is not None
    folder = tmp_path_factory.mktemp("spm")
    shutil.copyfile(file, folder / "tokenizer.model")
    return folder


def test_sentencepiece(sentencepiece: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    model: Any = SentencePieceProcessor(model_file=str(sentencepiece / "tokenizer.model"))
    size = model.vocab_size()
    found = vocabulary_of(sentencepiece, size + 2)
    assert found.kind == "llama"
    assert found.pieces == [*map(model.id_to_piece, range(size)), f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert found.scores[:size] == [model.get_score(number) for number in range(size)]
    types = gguf.TokenType
    for number in range(size):
        expected = (
            types.UNKNOWN
            if model.is_unknown(number)
            else types.CONTROL
            if model.is_control(number)
            else types.BYTE
            if model.is_byte(number)
            else types.NORMAL
        )
        assert found.types[number] == expected, found.pieces[number]
    assert found.around == (True, False)
    # What transformers saves of it has no scores: the order of its merges gives the same order of pieces.
    load_tokenizer(sentencepiece).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.model"))
    alone = vocabulary_of(tmp_path, size)
    assert (alone.pieces, alone.types) == (found.pieces[:size], found.types[:size])
    merged = [number for number in range(size) if alone.scores[number] > -1e8]
    assert len(merged) > 28_000
    by_score = sorted(merged, key=lambda number: -model.get_score(number))
    assert sorted(merged, key=lambda number: -alone.scores[number]) == by_score


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has 1999 tokens, but the model only 100"):
        vocabulary_of(embedded.resolve("embedded://mixtral_tiny"), 100)
    for change, message in (
        ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "of type WordLevel; only BPE"),
        ({"type": "BPE", "vocab": {"a": 0}, "merges": []}, "neither works on bytes nor falls back to them"),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": change}))
        with pytest.raises(CheckpointError, match=message):
            vocabulary_of(tmp_path, 10)


@pytest.mark.parametrize("name", list(NAMED))
def test_templates_write_the_same(name: str) -> None:
    """Without transformers' marks in GGUF, and in Go beside it, with a system prompt and without."""
    tokenizer = load_tokenizer("embedded://mixtral_tiny")

    def rendered(template: str, messages: list[dict[str, str]]) -> str:
        tokenizer.chat_template = template
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert "generation %}" not in without_marks(NAMED[name]).replace("add_generation", "")
    turns = None
    for messages in (TURNS, TURNS[1:], TURNS[1:2], TURNS[:2], [*TURNS, *TURNS[2:]]):
        expected = rendered(NAMED[name], messages)
        assert rendered(without_marks(NAMED[name]), messages) == expected
        turns = turns_of(tokenizer)
        assert turns is not None
        assert turns.render(messages) == expected.removeprefix("<s>")


def test_modelfile(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("embedded://mixtral_tiny")
    text, note = modelfile(tmp_path / "m.gguf", tokenizer)
    assert text == 'FROM ./m.gguf\n\nTEMPLATE """{{ .Prompt }}"""\n\nPARAMETER stop "</s>"\n'
    assert note is not None
    tokenizer.chat_template = MIXTRAL_V1
    text, note = modelfile(tmp_path / "m.gguf", tokenizer)
    assert note is None
    assert text == (
        'FROM ./m.gguf\n\nTEMPLATE """{{ $first := true }}{{ range $number, $_ := .Messages }}{{ if eq .Role "user" }}'
        "[INST] {{ if and $first $.System }}{{ $.System }}\n\n{{ end }}{{ $first = false }}{{ .Content }} [/INST]"
        '{{ else if eq .Role "assistant" }} {{ .Content }}</s>{{ end }}{{ end }}"""\n\n'
        'PARAMETER stop "</s>"\nPARAMETER stop "[INST]"\n'
    )
    tokenizer.chat_template = MIXTRAL_V3
    assert (
        "{{ if and (eq (len (slice $.Messages $number)) 1) $.System }}" in modelfile(tmp_path / "m.gguf", tokenizer)[0]
    )
    tokenizer.chat_template = CHATML
    text, _ = modelfile(tmp_path / "m.gguf", tokenizer)
    assert '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ end }}' in text
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "<|im_start|>user"\n')
    lengths = "{% for m in messages %}{{ m.content | length }}{% endfor %}"
    for odd in ("{{ messages | tojson }}", "{{ raise_exception('no') }}", lengths):
        tokenizer.chat_template = odd
        text, note = modelfile(tmp_path / "m.gguf", tokenizer)
        assert "TEMPLATE" not in text
        assert note is not None
        assert "cannot be translated" in note


def test_embedded_is_byte_level() -> None:
    found = vocabulary_of(embedded.resolve("embedded://mixtral_tiny"), 1999)
    assert (found.kind, found.words) == ("gpt2", "gpt-2")
    assert all(left + right in found.pieces for left, right in (pair.split(" ") for pair in found.merges))
