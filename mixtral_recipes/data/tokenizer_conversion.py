"""SentencePiece and tekken files as fast tokenizers that split text exactly alike.

transformers 5's own conversion of SentencePiece orders merges by token id; SentencePiece orders them by score, and the
two differ where spaces follow each other. What is made here is compared with the original on a few texts before it is
returned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_recipes.errors import DataError, in_short
from mixtral_recipes.system.packages import package

# Texts a converted tokenizer must split as its source does, or it is refused; identities cover them as well.
PROBES = (
    "Hello world",
    " two  spaces   three\n\nlines\tand a tab ",
    "def f(x):\n    return x ** 2  # 中文 العربية ελληνικά 🙂 \u200d",
    "1234567890 3.14 10,000 naïve café",
    "[INST] a [/INST] <s> </s> <unk>",
)


@dataclass(frozen=True)
class Converted:
    """A tokenizer in the `tokenizers` library's form, and its special tokens' texts by transformers' names."""

    backend: Any
    special: dict[str, str]


def convert(path: Path) -> Converted:
    """Convert a SentencePiece BPE model (``tokenizer.model``) or Mistral's ``tekken.json``.

    Raises:
        DataError: it is neither, or would be split differently.
        EnvironmentProblem: the package that reads it is missing, or cannot be imported.
    """
    return _from_tekken(path) if path.suffix == ".json" else _from_sentencepiece(path)


def _from_sentencepiece(path: Path) -> Converted:
    package("sentencepiece", f"{path} needs the package sentencepiece; pip install sentencepiece.")
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: not a SentencePiece model.") from error
    backend = _sentencepiece_backend(model)
    _compare(path, backend, model.encode)  # pyright: ignore[reportAttributeAccessIssue]
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    return Converted(backend, {name: model.id_to_piece(number) for name, number in ids.items() if number >= 0})


def _from_tekken(path: Path) -> Converted:
    missing = f"{path} needs the package mistral-common; pip install mistral-common."
    package("mistral_common.tokens.tokenizers.tekken", missing)
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    from transformers.integrations.mistral.tokenizer import MistralConverter

    try:
        original = Tekkenizer.from_file(path)
        backend = MistralConverter(str(path)).converted()
    except Exception as error:  # what an invalid file raises is not documented
        raise DataError(f"{path}: not a tekken tokenizer ({in_short(error)}).") from error
    _compare(path, backend, lambda text: original.encode(text, bos=False, eos=False))
    ids = {"bos_token": original.bos_id, "eos_token": original.eos_id, "unk_token": original.unk_id}
    return Converted(backend, {name: original.id_to_piece(number) for name, number in ids.items()})


def _compare(path: Path, backend: Any, encode: Callable[[str], list[int]]) -> None:
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True  # the originals take special tokens' texts for text
    for probe in PROBES:
        expected, found = encode(probe), backend.encode(probe, add_special_tokens=False).ids
        if found != expected:
            raise DataError(
                f"{path}: cannot be converted exactly ({probe!r} gives {found}, but the original gives {expected})."
            )
    backend.encode_special_tokens = before


def _sentencepiece_backend(model: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    special = [n for n in range(len(pieces)) if model.is_control(n) or model.is_unknown(n)]
    fast = Tokenizer(
        models.BPE(
            vocab, _merges(model, pieces, vocab), unk_token=pieces[model.unk_id()], fuse_unk=True, byte_fallback=True
        )
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(pieces[n], special=True, normalized=False) for n in special])
    return fast


def _merges(model: Any, pieces: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, best score first: what SentencePiece's BPE does at run time."""
    found = []
    for number, piece in enumerate(pieces):
        if model.is_control(number) or model.is_unknown(number) or model.is_byte(number):
            continue
        score = model.get_score(number)
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-score, number, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]
