"""Perplexity of a text, in overlapping windows over its tokens: each token is judged once, with context before it.

Source: the sliding window of transformers' documentation, "Perplexity of fixed-length models".
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixtral_recipes.data.recognise import recognize
from mixtral_recipes.data.records.bad_records import stop
from mixtral_recipes.data.records.files import suffix_of
from mixtral_recipes.data.records.text_parts import PLAIN_TEXT
from mixtral_recipes.errors import DataError, RecipeError
from mixtral_recipes.evaluation.likelihood import Ending, likelihoods
from mixtral_recipes.inference.model import InferenceModel

_WINDOW = 2048  # tokens, where the model has room for as many


def perplexity(
    model: InferenceModel, file: Path, *, window: int | None = None, stride: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Perplexity of a text file; all ranks call it together.

    Args:
        model: The model.
        file: Plain text, which is one document, or records with a ``text``, of which each is one.
        window: Tokens looked at together; None takes 2,048, or as many as the model has positions for.
        stride: Tokens by which the window moves on; None takes half a window.
        batch_size: Windows a data-parallel rank takes at once.

    Returns:
        ``perplexity`` (per token), ``bits_per_byte`` of UTF-8, which does not depend on the tokenizer,
        ``negative_log_likelihood`` per token, ``tokens`` and ``bytes`` judged, ``window``, ``stride``, ``data``.

    Raises:
        DataError: the file cannot be read, is not text, or is empty.
        RecipeError: a window or a stride that does not fit.
    """
    room = model.config.max_position_embeddings
    window = min(_WINDOW, room) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 2 <= window <= room:
        raise RecipeError(f"--window {window}: it must be at least 2 and at most the model's {room} positions.")
    if not 1 <= stride < window:
        raise RecipeError(f"--stride {stride}: it must be at least 1 and less than the window of {window} tokens.")
    endings: list[Ending] = []
    size = 0
    for text in documents(file):
        size += len(text.encode())
        ids = model.tokenizer(text, split_special_tokens=True)["input_ids"]  # as in a corpus
        endings += windows(list(ids), window, stride)
    tokens = sum(ending.judged for ending in endings)
    if not tokens:
        raise DataError(f"{file}: holds no text.")
    loss = -sum(found.total for found in likelihoods(model, endings, batch_size)) / tokens
    return {
        "data": str(file),
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss * tokens / size / math.log(2),
        "negative_log_likelihood": loss,
        "tokens": tokens,
        "bytes": size,
        "window": window,
        "stride": stride,
    }


def documents(file: Path) -> Iterator[str]:
    """The texts of a file: all of a plain one, else each record's.

    Raises:
        DataError: it cannot be read, or holds other records.
    """
    if suffix_of(file) in PLAIN_TEXT:
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text ({error}).") from error
        return
    found = recognize(file)
    if found.kind != "text" or found.source is None:
        raise DataError(
            f"{found.description}; perplexity is measured on plain text (.txt, .md) or records with a text."
        )
    for split in found.source.splits:
        for record in found.source.records(split, stop):
            yield str(record.value["text"])


def windows(tokens: list[int], window: int, stride: int) -> Iterator[Ending]:
    """Windows over a document; each token but the first is judged in one of them."""
    judged = 1
    for start in range(0, len(tokens), stride):
        end = min(start + window, len(tokens))
        if end > judged:
            yield Ending(tokens[start:end], end - judged)
        judged = max(judged, end)
        if end == len(tokens):
            return
