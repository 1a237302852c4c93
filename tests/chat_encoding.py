"""One conversation through `ChatEncoder`, as runs take it, several at once."""

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
