"""Tokenizers from any source: a checkpoint, the Hub, a SentencePiece file, or mistral-common's own.

All come back as a fast transformers tokenizer, so that offsets are known and an export carries ``tokenizer.json``.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mixtral_recipes.data.records.chat_templates import MIXTRAL_V1, MIXTRAL_V3
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import DataError, EnvironmentProblem, MixtralRecipesError, in_short, nearest
from mixtral_recipes.system.files import read_json

MISTRAL = "mistral://"
# name -> (file in the mistral-common package, chat template)
MISTRAL_FILES = {
    "mixtral-8x7b": ("tokenizer.model.v1", MIXTRAL_V1),
    "mixtral-8x7b-instruct": ("tokenizer.model.v1", MIXTRAL_V1),
    "mixtral-8x22b": ("tokenizer.model.v1", MIXTRAL_V1),
    "mixtral-8x22b-instruct": ("mistral_instruct_tokenizer_240323.model.v3", MIXTRAL_V3),
}
# Texts a converted tokenizer must split as its source does, or it is refused; they are part of an identity as well.
_PROBES = (
    "Hello world",
    " two  spaces   three\n\nlines\tand a tab ",
    "def f(x):\n    return x ** 2  # 中文 العربية ελληνικά 🙂 \u200d",
    "1234567890 3.14 10,000 naïve café",
    "[INST] a [/INST] <s> </s> <unk>",
)
_STRIDE = 7919  # a prime: each piece of a vocabulary meets one from far away


def tokenizer_identity(tokenizer: Any) -> str:
    """What a tokenizer does, in one hash: what is recorded with a run, an export and prepared data, and compared.

    Two files that describe the same tokenizer in other words (SentencePiece's and ``tokenizer.json``, or those of two
    releases of a library) have one identity; padding, which is masked everywhere, is no part of it.

    Args:
        tokenizer: As `load_tokenizer` gives it.

    Returns:
        SHA-256, in hexadecimal, over `text_identity`, what is put around a text, and the chat template.
    """
    around = tokenizer.encode("a")
    return _hash([text_identity(tokenizer), around, tokenizer.chat_template])


def text_identity(tokenizer: Any) -> str:
    """How a tokenizer turns documents into tokens: the part of its identity that a prepared corpus depends on.

    Covers every token's id, the ends of documents, and how texts are split: some of many kinds, and each piece of the
    vocabulary followed by another one, so that the order of merges shows.

    Args:
        tokenizer: As `load_tokenizer` gives it.
    """
    vocabulary = tokenizer.get_vocab()
    pieces = [piece.replace("▁", " ").replace("Ġ", " ") for piece in sorted(vocabulary, key=lambda p: vocabulary[p])]
    pairs = [piece + pieces[(number * _STRIDE + 1) % len(pieces)] for number, piece in enumerate(pieces)]
    split = tokenizer([*_PROBES, *pairs], add_special_tokens=False)["input_ids"]
    return _hash([sorted(vocabulary.items()), tokenizer.bos_token_id, tokenizer.eos_token_id, split])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_tokenizer(source: str | Path, *, error: type[MixtralRecipesError] = DataError) -> Any:
    """A fast transformers tokenizer.

    Args:
        source: A folder or Hub id; a checkpoint; a SentencePiece file (``tokenizer.model``, ``*.model.v3``); a folder
            that holds one and no ``tokenizer.json``; ``mistral://mixtral-8x7b`` and the other names in `MISTRAL_FILES`,
            which need no download; ``embedded://mixtral_tiny``.
        error: What to raise where a folder or repository has none that loads.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    text = str(source)
    if text.startswith(MISTRAL):
        return _from_mistral_common(text.removeprefix(MISTRAL))
    path = resolve(text.removeprefix("hf://"))
    if path.is_file():
        return from_sentencepiece(path)
    if (path / "context").is_dir():
        path /= "context"
    models = sorted(path.glob("tokenizer*.model*")) if path.is_dir() and not (path / "tokenizer.json").exists() else []
    if models:
        return from_sentencepiece(models[0], chat_template=_own_template(path))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as failure:
        raise error(f"{source}: no tokenizer can be loaded ({in_short(failure)}).") from failure


def _own_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = (read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    return template if isinstance(template, str) else None


def _from_mistral_common(name: str) -> Any:
    if name not in MISTRAL_FILES:
        raise DataError(f"{MISTRAL}{name} is not known.{nearest(name, tuple(MISTRAL_FILES))}")
    try:
        import mistral_common
    except ImportError as error:
        raise EnvironmentProblem(
            f"{MISTRAL}{name} is read from the package mistral-common; run `pip install mistral-common`."
        ) from error
    file, template = MISTRAL_FILES[name]
    assert mistral_common.__file__ is not None
    return from_sentencepiece(Path(mistral_common.__file__).parent / "data" / file, chat_template=template)


def from_sentencepiece(path: Path, *, chat_template: str | None = None) -> Any:
    """Convert a SentencePiece BPE model to a fast tokenizer that splits text exactly alike.

    transformers 5's own conversion orders merges by token id; SentencePiece orders them by score, and the two differ
    where spaces follow each other. The result is compared with SentencePiece on a few texts before it is returned.

    Args:
        path: The model file.
        chat_template: The template; None takes Mixtral's that fits the file's control tokens.

    Raises:
        DataError: not a SentencePiece BPE model, or one that would be split differently.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise EnvironmentProblem(f"{path} needs the package sentencepiece; pip install sentencepiece.") from error
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: not a SentencePiece model.") from error
    tokenizer = _fast_tokenizer(model, path)
    for probe in _PROBES:
        expected = model.encode(probe)  # pyright: ignore[reportAttributeAccessIssue]
        found = tokenizer.encode(probe, add_special_tokens=False, split_special_tokens=True)
        if found != expected:
            raise DataError(f"{path}: cannot be converted exactly ({probe!r} gives {found}, SentencePiece {expected}).")
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    tokenizer.chat_template = chat_template or (MIXTRAL_V3 if "[INST]" in special else MIXTRAL_V1)
    return tokenizer


def _fast_tokenizer(model: Any, path: Path) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [model.id_to_piece(number) for number in range(model.vocab_size())]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    special = [n for n in range(len(pieces)) if model.is_control(n) or model.is_unknown(n)]
    unknown = pieces[model.unk_id()]
    fast = Tokenizer(
        models.BPE(vocab, _merges(model, pieces, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bos, eos = (pieces[n] if n >= 0 else None for n in (model.bos_id(), model.eos_id()))
    if bos is not None:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    fast.add_special_tokens([AddedToken(pieces[n], special=True, normalized=False) for n in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        name_or_path=str(path.name),
    )


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
