"""A tokenizer's files, and what they say without any of them being loaded into a library."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import DataError, MixtralRecipesError, in_short
from mixtral_recipes.system.hub_ids import is_hub_id, refuse_misspelt_path
from mixtral_recipes.system.json_files import read_object
from mixtral_recipes.system.schema import typed

MISTRAL = "mistral://"
# name -> file in the mistral-common package
MISTRAL_FILES = {
    "mixtral-8x7b": "tokenizer.model.v1",
    "mixtral-8x7b-instruct": "tokenizer.model.v1",
    "mixtral-8x22b": "tokenizer.model.v1",
    "mixtral-8x22b-instruct": "mistral_instruct_tokenizer_240323.model.v3",
}
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
)
# All that a tokenizer may consist of.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer*.model*", "tekken.json", *SETTINGS)


type _Id = Annotated[int, Meta(ge=0, lt=1 << 24)]
type _Token = str | dict[str, Any] | None  # its text, or its text and how it is treated


class _Added(TypedDict):
    id: _Id
    content: str


class _Vocabulary(TypedDict, total=False):
    vocab: dict[str, _Id] | list[Any]


class _Settings(TypedDict, total=False):
    """tokenizer_config.json, special_tokens_map.json and chat_template.json, as far as they are used here."""

    added_tokens_decoder: dict[Annotated[str, Meta(pattern=r"^\d{1,8}$")], _Token]
    bos_token: _Token
    eos_token: _Token
    add_bos_token: bool | None
    add_eos_token: bool | None
    chat_template: Any


class _Tokenizer(TypedDict, total=False):
    """tokenizer.json."""

    model: _Vocabulary
    added_tokens: list[_Added] | None


class _TekkenConfig(TypedDict, total=False):
    default_vocab_size: _Id


class _Tekken(TypedDict, total=False):
    config: _TekkenConfig


_SHAPES: dict[str, Any] = {
    "tokenizer.json": _Tokenizer,
    "tekken.json": _Tekken,
    "added_tokens.json": dict[str, _Id],
}


def original_file(folder: Path) -> Path | None:
    """The file a folder's tokenizer comes from where it has no tokenizer.json: Mistral's newest, as mistral-common."""
    for name in ("tekken.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    return max(folder.glob("tokenizer*.model*"), default=None)


def mistral_file(name: str) -> Path | None:
    """The file of one of `MISTRAL_FILES`; None where mistral-common is not installed."""
    spec = find_spec("mistral_common")
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(folders[0]) / "data" / MISTRAL_FILES[name] if folders else None


def settings(file: Path) -> dict[str, Any]:
    """One of a tokenizer's JSON files; empty where there is none.

    Raises:
        DataError: it is there and cannot be read, or says something that no tokenizer's file says.
    """
    if not file.is_file():
        return {}
    try:
        found = read_object(file, DataError)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({in_short(error)}).") from error
    typed(found, _SHAPES.get(file.name, _Settings), file, DataError)
    return found


def text_of(token: Any) -> str | None:
    """A special token's text, in either spelling that settings have for it."""
    return token.get("content") if isinstance(token, dict) else token


def declared_tokens(folder: Path) -> dict[str, dict[str, int]]:
    """The added tokens' ids by the name of the file that says so.

    Raises:
        DataError: a file cannot be read.
    """
    decoder = settings(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return {
        "tokenizer_config.json": {str(text_of(token)): int(number) for number, token in decoder.items()},
        "added_tokens.json": settings(folder / "added_tokens.json"),
    }


def refuse_nowhere(source: str | Path, error: type[MixtralRecipesError]) -> None:
    """Refuse a name that leads to nothing on this machine and cannot be a Hub id, without asking the Hub.

    Args:
        source: As `tokenizers.load_tokenizer` takes it.
        error: What to raise.
    """
    name = str(source).removeprefix("hf://")
    if name.startswith(MISTRAL) or (name and resolve(name).expanduser().exists()):  # "" would be this folder
        return
    if not is_hub_id(name.partition("@")[0]):
        raise error(f"tokenizer {source}: neither a folder or file that exists nor a Hub id (org/name).")
    refuse_misspelt_path(str(source), "model", error)


def size_on_disk(source: str | Path) -> int | None:
    """The largest id plus one of a tokenizer on this machine, told from its files at once.

    Args:
        source: As `tokenizers.load_tokenizer` takes it.

    Returns:
        The size; None where nothing is on this machine, or only loading it could tell.

    Raises:
        DataError: a file cannot be read.
    """
    text = str(source)
    if text.startswith(MISTRAL):
        name = text.removeprefix(MISTRAL)
        file = mistral_file(name) if name in MISTRAL_FILES else None
        return _size_of(file) if file else None
    path = resolve(text.removeprefix("hf://")).expanduser()
    if path.is_file():
        return _size_of(path)
    if (path / "context").is_dir():
        path /= "context"
    file = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else original_file(path)
    if file is None:
        return None
    size = _size_of(file)
    declared = [number for tokens in declared_tokens(path).values() for number in tokens.values()]
    return size and max([size - 1, *declared]) + 1


def _size_of(file: Path) -> int | None:
    """Of one file, without what stands beside it."""
    if file.suffix != ".json":
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(file)).vocab_size()
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file}: not a SentencePiece model.") from error
    content = settings(file)
    if file.name == "tekken.json":
        return (content.get("config") or {}).get("default_vocab_size")
    vocabulary = (content.get("model") or {}).get("vocab")
    added = [token["id"] for token in content.get("added_tokens") or []]
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary or []) - 1]
    return max([*ids, *added]) + 1
