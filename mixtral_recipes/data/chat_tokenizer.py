"""A tokenizer with the chat template a run trains with, which its checkpoints carry: they are asked as they learned."""

import copy
import re
from typing import Any

from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.chat_templates import named_template

_MARKER = re.compile(r"<\|[^\s|<>]+\|>")


def missing_markers(tokenizer: Any, template: str) -> list[str]:
    """What a template writes in the form of control tokens (``<|im_start|>``) and the tokenizer has no token for.

    Args:
        tokenizer: A transformers tokenizer.
        template: The template's text.
    """
    known = {token.content for token in tokenizer.added_tokens_decoder.values()} | tokenizer.get_vocab().keys()
    return [marker for marker in dict.fromkeys(_MARKER.findall(template)) if marker not in known]


def with_template(tokenizer: Any, chat_template: str, *, grow: bool) -> Any:
    """A copy of a tokenizer that has a chat template for its own.

    Args:
        tokenizer: A fast transformers tokenizer.
        chat_template: As `named_template` takes it.
        grow: Whether the markers it has no token for become tokens; the one that ends the assistant's turns then ends
            texts. Otherwise they stay text.

    Raises:
        DataError: there is no such template.
    """
    template = named_template(chat_template)
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    missing = missing_markers(made, template)
    if grow and missing:
        made.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
        end = ChatEncoder(made).end_of_turn
        if end in missing:
            made.eos_token = end
    return made
