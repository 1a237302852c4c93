"""Which tokenizer, in NeMo's spelling; `data/tokenizers.py` loads it."""

from dataclasses import dataclass
from typing import Any

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.settings.nemo.calls import takes_nemos_arguments


@takes_nemos_arguments
@dataclass
class AutoTokenizer:
    """A tokenizer from the Hub or a folder.

    Attributes:
        pretrained_model_name: Hub id, folder, SentencePiece file, ``mistral://NAME`` or ``embedded://mixtral_tiny``.
        vocab_file: A GPT-2 vocabulary (``vocab.json``) that is read instead, with ``merges_file``.
        merges_file: Its merges (``merges.txt``).
        chat_template: A Jinja template instead of the tokenizer's own, or a file with one.
    """

    pretrained_model_name: str
    vocab_file: str | None = None
    merges_file: str | None = None
    chat_template: str | None = None


@dataclass
class NullTokenizer:
    """No tokenizer, only a vocabulary size, for random data.

    Attributes:
        vocab_size: Tokens to draw from.
    """

    vocab_size: int = 32000


@takes_nemos_arguments
def get_nmt_tokenizer(
    library: str = "sentencepiece",
    model_name: str | None = None,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merges_file: str | None = None,
    chat_template: str | None = None,
    vocab_size: int | None = None,
) -> AutoTokenizer | NullTokenizer:
    """NeMo's function of this name, for the libraries a Mixtral is used with.

    Args:
        library: ``huggingface``, ``sentencepiece``, ``megatron`` (GPT-2's BPE from two files), or ``null``.
        model_name: huggingface: Hub id or folder.
        tokenizer_model: sentencepiece: the model file.
        vocab_file: megatron: ``vocab.json``.
        merges_file: megatron: ``merges.txt``.
        chat_template: huggingface: a template instead of the tokenizer's own.
        vocab_size: null: how many tokens there are.

    Raises:
        RecipeError: another library, or a file is not named.
    """
    if library == "null":
        return NullTokenizer(vocab_size or NullTokenizer.vocab_size)
    if library == "megatron" and vocab_file and merges_file:
        return AutoTokenizer(model_name or "GPT2BPETokenizer", vocab_file, merges_file)
    named = {"huggingface": model_name, "sentencepiece": tokenizer_model}
    if library not in named:
        raise RecipeError(
            f"get_nmt_tokenizer(library={library!r}): use 'huggingface', 'sentencepiece', 'megatron' with GPT-2's "
            "vocab_file and merges_file, or 'null'."
        )
    name = named[library]
    if not name:
        argument = "model_name" if library == "huggingface" else "tokenizer_model"
        raise RecipeError(f"get_nmt_tokenizer(library={library!r}) needs {argument}.")
    return AutoTokenizer(name, chat_template=chat_template)


def of_recipe(tokenizer: Any, data: Any) -> Any:
    """The tokenizer a recipe names; None where it asks for the model's or the checkpoint's.

    Args:
        tokenizer: The recipe's word: ``"data"``, ``"model"``, None, or a tokenizer.
        data: Its data module.
    """
    if isinstance(tokenizer, str) and tokenizer in ("data", "model"):
        return getattr(data, "tokenizer", None) if tokenizer == "data" else None
    return tokenizer
