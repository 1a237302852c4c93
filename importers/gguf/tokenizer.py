"""A tokenizer as GGUF's metadata: llama.cpp has nothing else to split text with.

Two kinds are known there that a Mixtral can have: SentencePiece's (``llama``: pieces, merged in the order of their
scores) and byte-level BPE (``gpt2``: merges, and a rule for words that llama.cpp has by name).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.data.tokenizer_files import original_file
from mixtral_recipes.data.tokenizers import load_tokenizer, vocabulary_size
from mixtral_recipes.errors import CheckpointError
from mixtral_recipes.importers.gguf.extra import package

# Rules for words by their regular expressions. Source: mistral-common's tekken; meta-llama/Meta-Llama-3 tokenizer.json.
_WORDS = {
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "tekken",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+": "llama-bpe",
}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER_MERGED = -1e9


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to split text.

    Attributes:
        tokenizer: The transformers tokenizer it was made of.
        kind: ``llama`` or ``gpt2``.
        pieces: Text of each id.
        types: What each is, in gguf's ``TokenType``.
        scores: Of a ``llama``: a pair of pieces that makes a better one is joined first.
        merges: Of a ``gpt2``: the pairs that are joined, first ones first.
        words: Of a ``gpt2``: llama.cpp's name of the rule for words.
    """

    tokenizer: Any
    kind: str
    pieces: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    words: str

    @property
    def around(self) -> tuple[bool, bool]:
        """Whether the first and the last token of a text are put there."""
        ids = self.tokenizer("a")["input_ids"]
        return ids[0] == self.tokenizer.bos_token_id, ids[-1] == self.tokenizer.eos_token_id

    def write(self, writer: Any) -> None:
        """Add it to gguf's ``GGUFWriter``, with special tokens and chat templates."""
        tokenizer = self.tokenizer
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(self.words)
        writer.add_token_list(self.pieces)
        if self.kind == "llama":
            writer.add_token_scores(self.scores)
            first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
            writer.add_add_space_prefix(first.startswith("▁"))
        elif self.merges:
            writer.add_token_merges(self.merges)
        writer.add_token_types(self.types)
        for name in ("bos", "eos", "unk", "pad"):
            number = getattr(tokenizer, f"{name}_token_id")
            if number is not None:
                getattr(writer, f"add_{name}_token_id")(number)
        first_added, last_added = self.around
        writer.add_add_bos_token(first_added)
        writer.add_add_eos_token(last_added)
        templates = tokenizer.chat_template
        if isinstance(templates, dict):
            named = [{"name": name, "template": without_marks(text)} for name, text in sorted(templates.items())]
            writer.add_chat_template(named)
        elif templates:
            writer.add_chat_template(without_marks(templates))


def vocabulary_of(context: Path, size: int) -> Vocabulary:
    """The vocabulary of a checkpoint.

    Args:
        context: The folder with the tokenizer's files.
        size: Rows of the model's embeddings; ids without a token are filled up, as llama.cpp wants one for each.

    Raises:
        CheckpointError: there is no tokenizer, it has more tokens than the model, or llama.cpp lacks its kind.
    """
    tokenizer = load_tokenizer(context, error=CheckpointError)
    if vocabulary_size(tokenizer) > size:
        raise CheckpointError(
            f"{context}: the tokenizer has {vocabulary_size(tokenizer)} tokens, but the model only {size}; they do not "
            "belong together."
        )
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    model = plain["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"{context}: its tokenizer is of type {model.get('type')}; only BPE can be stored in GGUF."
        )
    spaced = (plain.get("decoder") or {}).get("type") == "ByteLevel"
    pieces = [f"[PAD{number}]" for number in range(size)]
    types = [package("gguf").TokenType.UNUSED.value] * size
    for piece, number in tokenizer.get_vocab().items():
        pieces[number], types[number] = piece, _type(piece, bytes_spelled=not spaced)
    for token in plain["added_tokens"]:
        pieces[token["id"]] = token["content"]
        types[token["id"]] = _added_type(token, unknown=model.get("unk_token"), byte_level=spaced)
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    if spaced:
        joined = [" ".join(pair) for pair in merges]
        return Vocabulary(tokenizer, "gpt2", pieces, types, [], joined, _words(context, plain["pre_tokenizer"]))
    if not model.get("byte_fallback"):
        raise CheckpointError(
            f"{context}: its BPE neither works on bytes nor falls back to them; llama.cpp does not support such a "
            "tokenizer."
        )
    return Vocabulary(tokenizer, "llama", pieces, types, _scores(context, pieces, merges), [], "default")


def without_marks(template: str) -> str:
    """A chat template without ``{% generation %}``, which only transformers knows; it writes the same text."""
    template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)


def _type(piece: str, *, bytes_spelled: bool) -> int:
    types = package("gguf").TokenType
    return (types.BYTE if bytes_spelled and _BYTE.fullmatch(piece) else types.NORMAL).value


def _added_type(token: dict[str, Any], *, unknown: str | None, byte_level: bool) -> int:
    types = package("gguf").TokenType
    if token["content"] == unknown and not byte_level:
        return types.UNKNOWN.value
    return (types.CONTROL if token["special"] else types.USER_DEFINED).value


def _scores(context: Path, pieces: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that join pieces in the order the merges have; SentencePiece's own where its file is there."""
    original = original_file(context)
    if original is not None and original.suffix != ".json":
        from sentencepiece import SentencePieceProcessor

        model: Any = SentencePieceProcessor(model_file=str(original))
        return [model.get_score(n) if n < model.vocab_size() else _NEVER_MERGED for n in range(len(pieces))]
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [float(-rank[piece]) if piece in rank else _NEVER_MERGED for piece in pieces]


def _words(context: Path, rule: dict[str, Any] | None) -> str:
    """llama.cpp's name of the rule that cuts text into words before bytes are merged."""
    steps = (rule or {}).get("pretokenizers") or [rule or {}]
    for step in steps:
        pattern = (step.get("pattern") or {}).get("Regex")
        if step.get("type") == "Split" and pattern in _WORDS:
            return _WORDS[pattern]
    if len(steps) == 1 and steps[0].get("type") == "ByteLevel" and steps[0].get("use_regex", True):
        return "gpt-2"
    raise CheckpointError(
        f"{context}: its tokenizer splits text into words by a rule that llama.cpp does not know, so it cannot be "
        "stored in GGUF."
    )
