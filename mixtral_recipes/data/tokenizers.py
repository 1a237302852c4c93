"""Tokenizers from any source: a checkpoint, the Hub, a SentencePiece file, or mistral-common's own.

All come back as a fast transformers tokenizer, so that offsets are known and an export carries ``tokenizer.json``.
"""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from mixtral_recipes.data.records.chat_templates import default_template
from mixtral_recipes.data.tokenizer_bounds import refuse_endless
from mixtral_recipes.data.tokenizer_conversion import PROBES, Converted, convert
from mixtral_recipes.data.tokenizer_files import (
    MISTRAL,
    MISTRAL_FILES,
    SETTINGS,
    TOKENIZER_FILES,
    declared_tokens,
    mistral_file,
    original_file,
    refuse_nowhere,
    settings,
)
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import (
    DataError,
    EnvironmentProblem,
    MixtralRecipesError,
    MixtralRecipesWarning,
    in_short,
    is_panic,
    nearest,
)
from mixtral_recipes.layout.shapes import LARGEST
from mixtral_recipes.system.files import write_json
from mixtral_recipes.system.json_files import MOST_BYTES, hash_of
from mixtral_recipes.system.pointers import refuse_pointer

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
    return hash_of([text_identity(tokenizer), around, tokenizer.chat_template])


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
    texts = [*PROBES, *pairs]
    tokenizer(texts[0], add_special_tokens=False)  # sets the backend: neither padded nor cut
    split = [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return hash_of([sorted(vocabulary.items()), tokenizer.bos_token_id, tokenizer.eos_token_id, split])


def vocabulary_size(tokenizer: Any) -> int:
    """The largest id plus one: how many rows a model's embeddings need."""
    return max(tokenizer.get_vocab().values()) + 1


def load_tokenizer(source: str | Path, *, error: type[MixtralRecipesError] = DataError) -> Any:
    """A fast transformers tokenizer, with all that its folder says: added and special tokens, chat templates.

    Args:
        source: A folder or Hub id (``org/name[@revision]``); a checkpoint; a SentencePiece file (``tokenizer.model``,
            ``*.model.v3``) or ``tekken.json``; a folder that holds one of these and no ``tokenizer.json``;
            ``mistral://mixtral-8x7b`` and the other names in `MISTRAL_FILES`, which need no download;
            ``embedded://mixtral_tiny``.
        error: What to raise where a folder or repository has none that loads.

    Raises:
        DataError: there is none, it cannot be read, or its files contradict each other.
    """
    text = str(source)
    if text.startswith(MISTRAL):
        return _from_mistral_common(text.removeprefix(MISTRAL))
    path = resolve(text.removeprefix("hf://")).expanduser()
    if path.is_file():
        refuse_pointer(path, DataError)
        return _with_settings(convert(path), None)
    if not path.is_dir():
        refuse_nowhere(source, error)
        path = _download(text.removeprefix("hf://"), error)
    if (path / "context").is_dir():
        path /= "context"
    return _from_folder(path, str(source), error)


def _download(repo: str, error: type[MixtralRecipesError]) -> Path:
    """The folder with a Hub repository's tokenizer files; what is cached is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    name, _, revision = repo.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, ValueError, HTTPError) as failure:
        raise error(f"{repo}: no tokenizer can be loaded ({in_short(failure)}).") from failure


def _from_folder(path: Path, source: str, error: type[MixtralRecipesError]) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    for file in (file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
        refuse_pointer(file, error)
        if file.is_file() and file.stat().st_size > MOST_BYTES:
            raise error(f"{file}: has {file.stat().st_size} bytes; the limit is {MOST_BYTES}.")
    original = original_file(path)
    try:
        if (path / "tokenizer.json").is_file():
            # As the file says: AutoTokenizer would choose a class by config.json, and some rebuild what they read.
            loaded = PreTrainedTokenizerFast.from_pretrained(path)
            _notice_another(loaded, path / "tekken.json")
        elif original is not None:
            loaded = _with_settings(convert(original), path)
        else:
            loaded = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        if getattr(loaded, "backend_tokenizer", None) is not None:
            refuse_endless(loaded.backend_tokenizer, source, error)
    except MixtralRecipesError:
        raise
    except BaseException as failure:  # the tokenizers library raises bare Exceptions for a file it cannot parse
        if not (isinstance(failure, Exception) or is_panic(failure)):
            raise
        raise error(f"{source}: no tokenizer can be loaded ({in_short(failure)}).") from failure
    legacy = settings(path / "chat_template.json")
    if not loaded.chat_template and legacy.get("chat_template"):
        loaded.chat_template = legacy["chat_template"]
    _check_added_tokens(loaded, path)
    return loaded


def _notice_another(tokenizer: Any, tekken: Path) -> None:
    """Say which tokenizer is used where a folder holds two that differ."""
    size = (settings(tekken).get("config") or {}).get("default_vocab_size")
    if size is not None and size != len(tokenizer):
        text = (
            f"{tekken.parent}: tokenizer.json has {len(tokenizer)} tokens, but tekken.json has {size}; tokenizer.json "
            "is used. Remove the one that does not belong to the model."
        )
        warnings.warn(text, MixtralRecipesWarning, stacklevel=4)


def _with_settings(converted: Converted, folder: Path | None) -> Any:
    """A converted tokenizer with what a folder says beside it, read by transformers as beside any tokenizer.json."""
    from transformers import PreTrainedTokenizerFast

    config = settings(folder / "tokenizer_config.json") if folder else {}
    with tempfile.TemporaryDirectory() as name:
        beside = Path(name)
        if folder is not None:
            for file in (file for pattern in SETTINGS for file in folder.glob(pattern)):
                (beside / file.relative_to(folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, beside / file.relative_to(folder))
        config = {"clean_up_tokenization_spaces": False, **converted.special, **config}
        write_json(beside / "tokenizer_config.json", config)
        converted.backend.save(str(beside / "tokenizer.json"))
        loaded = PreTrainedTokenizerFast.from_pretrained(beside)
    _put_around(loaded, config)
    if not loaded.chat_template:
        loaded.chat_template = default_template({token.content for token in loaded.added_tokens_decoder.values()})
    return loaded


def _put_around(tokenizer: Any, config: dict[str, Any]) -> None:
    """Set what is put around a text that is encoded with special tokens: bos, unless the settings say otherwise."""
    from tokenizers import processors

    bos = tokenizer.bos_token if config.get("add_bos_token", True) else None
    eos = tokenizer.eos_token if config.get("add_eos_token", False) else None
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {bos, eos} - {None}]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=ids
    )


def _check_added_tokens(tokenizer: Any, folder: Path) -> None:
    """Refuse files that give a token another id than the tokenizer made of all of them does, or one beyond every model.

    The library counts up to the last id when it writes a tokenizer down.

    Raises:
        DataError: names the file, the token and both ids.
    """
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary.get(last, 0) >= LARGEST["vocab_size"]:
        raise DataError(
            f"{folder}: token {last!r} has id {vocabulary[last]}; ids must be below {LARGEST['vocab_size']}."
        )
    for file, tokens in declared_tokens(folder).items():
        for text, number in tokens.items():
            if vocabulary.get(text) != number:
                raise DataError(
                    f"{folder / file}: token {text!r} has id {number}, but the tokenizer built from this folder's "
                    f"files gives it {vocabulary.get(text)}; the files belong to different tokenizers."
                )


def _from_mistral_common(name: str) -> Any:
    if name not in MISTRAL_FILES:
        raise DataError(f"{MISTRAL}{name} is not a known tokenizer.{nearest(name, tuple(MISTRAL_FILES))}")
    file = mistral_file(name)
    if file is None:
        raise EnvironmentProblem(
            f"{MISTRAL}{name} is read from the package mistral-common; run `pip install mistral-common`."
        )
    return _with_settings(convert(file), None)
