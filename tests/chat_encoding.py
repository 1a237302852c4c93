"""One conversation through `ChatEncoder`, as runs take it, several at once; and what of it is learned."""

from typing import Any

from mixtral_recipes.data.batches.fit import Encoded
from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.conversations import Conversation
from mixtral_recipes.errors import DataError


def encode_one(encoder: ChatEncoder, talk: Conversation | list[Any], where: str = "conversation") -> Encoded:
    """Tokenize one conversation, or raise its error; of plain messages the assistant's are learned."""
    if isinstance(talk, list):
        talk = Conversation(talk, [message["role"] == "assistant" for message in talk])
    (found,) = encoder.encode_some([(talk, where)])
    if isinstance(found, DataError):
        raise found
    return found


def learned_text(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The learned stretches, as text."""
    stretches: list[list[int]] = [[]]
    for token, is_learned in zip(encoded.tokens, encoded.learned, strict=True):
        if is_learned:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch).strip() for stretch in stretches if stretch]
