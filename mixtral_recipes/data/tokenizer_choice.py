"""The tokenizer of a recipe, however it is named."""

from pathlib import Path
from typing import Any

from mixtral_recipes.data import tokenizer_files
from mixtral_recipes.data.records.chat_templates import named_template
from mixtral_recipes.data.tokenizers import load_tokenizer, vocabulary_size
from mixtral_recipes.embedded import PREFIX
from mixtral_recipes.errors import DataError, MixtralRecipesError, RecipeError
from mixtral_recipes.settings.nemo.rules import short
from mixtral_recipes.settings.tokenizer import AutoTokenizer, NullTokenizer
from mixtral_recipes.system.hub_ids import warn_of_a_word

_NO_DOWNLOAD = (
    *(f"{tokenizer_files.MISTRAL}{name}" for name in tokenizer_files.MISTRAL_FILES),
    f"{PREFIX}mixtral_tiny",
)


def chosen_tokenizer(named: Any, *, error: type[MixtralRecipesError] = DataError) -> Any:
    """A transformers tokenizer.

    Args:
        named: A folder, file or Hub id; an `AutoTokenizer` or `NullTokenizer`; a tokenizer itself; or None.
        error: What to raise where a name leads to none.

    Returns:
        The tokenizer; None where ``named`` is none.

    Raises:
        RecipeError: it is neither.
    """
    _refuse_other(named)
    if named is None or isinstance(named, NullTokenizer):
        return None
    if isinstance(named, str | Path):
        return load_tokenizer(named, error=error)
    return _by_settings(named, error) if isinstance(named, AutoTokenizer) else named


def _refuse_other(named: Any) -> None:
    if named is None or isinstance(named, str | Path | AutoTokenizer | NullTokenizer):
        return
    if not (callable(getattr(named, "encode", None)) and callable(getattr(named, "save_pretrained", None))):
        raise RecipeError(
            f"tokenizer={short(named)} is not a tokenizer; pass a folder, a Hub id, AutoTokenizer(...), or a "
            "transformers tokenizer."
        )


def check_place(named: Any) -> None:
    """Refuse a tokenizer that cannot be found, and warn of a doubtful one, without reading it or asking the Hub.

    Args:
        named: As `chosen_tokenizer` takes it.

    Raises:
        DataError: there is none on this machine, and it is not a Hub id.
        RecipeError: it is something else than a tokenizer.
    """
    _refuse_other(named)
    by_files = isinstance(named, AutoTokenizer) and named.vocab_file
    if isinstance(named, str | Path | AutoTokenizer) and not by_files:
        name = described(named)
        tokenizer_files.refuse_nowhere(name, DataError)
        warn_of_a_word(name, "model", _NO_DOWNLOAD)


def described(named: Any) -> str:
    """A tokenizer in a few words, for errors."""
    if isinstance(named, AutoTokenizer):
        return named.pretrained_model_name
    return str(named) if isinstance(named, str | Path) else type(named).__name__


def size_on_disk(named: Any) -> int | None:
    """The largest id plus one of the tokenizer that would be chosen; None where there is none, or it is not here.

    Args:
        named: As `chosen_tokenizer` takes it.
    """
    if isinstance(named, AutoTokenizer):
        named = None if named.vocab_file else named.pretrained_model_name
    if isinstance(named, str | Path):
        return tokenizer_files.size_on_disk(named)
    return vocabulary_size(named) if hasattr(named, "get_vocab") else None


def _by_settings(settings: AutoTokenizer, error: type[MixtralRecipesError]) -> Any:
    if settings.vocab_file and settings.merges_file:
        from transformers import GPT2Tokenizer

        for file in (settings.vocab_file, settings.merges_file):
            if not Path(file).is_file():
                raise error(f"{file}: no such file.")
        tokenizer: Any = GPT2Tokenizer(vocab=settings.vocab_file, merges=settings.merges_file)
    else:
        tokenizer = load_tokenizer(settings.pretrained_model_name, error=error)
    template = settings.chat_template
    if template is not None:
        tokenizer.chat_template = named_template(template)
    return tokenizer
