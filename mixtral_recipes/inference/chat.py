"""A conversation with a model, in the form its tokenizer's chat template gives it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.chat_templates import template_of
from mixtral_recipes.data.records.conversations import joined_texts
from mixtral_recipes.data.records.template_sandbox import render
from mixtral_recipes.errors import DataError
from mixtral_recipes.inference.sampling import Sampling
from mixtral_recipes.inference.text import refuse_halves

Message = dict[str, str]

_MARK = "8c1f0b"  # an answer that no template holds


@dataclass
class Conversation:
    """What was said so far.

    Attributes:
        tokenizer: Its chat template turns messages into tokens.
        system: What the model is told before everything else; empty is nothing.
        messages: The turns, each with ``role`` and ``content``.
    """

    tokenizer: Any
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        refuse_without_template(self.tokenizer)

    def asked(self, text: str) -> list[int]:
        """The tokens of the conversation with a new question, up to where the answer begins.

        Raises:
            DataError: the template refuses it, or there is none.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        return tokens_of(self.tokenizer, [*system, *self.messages, {"role": "user", "content": text}])

    def answered(self, question: str, answer: str) -> None:
        """Keep a turn."""
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Forget the turns; what the system said stays."""
        self.messages.clear()


def tokens_of(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Messages as the tokenizer's chat template has them, ready for an answer: the tokens that stand there in training.

    Neighbours of one role are joined, and a control token that a message spells out is text, as in records. A template
    without a place for a system message, as Mixtral's first ones, gets it before the first question.

    Raises:
        DataError: the tokenizer has no template, it refuses these messages, or they hold what is not a character.
    """
    refuse_without_template(tokenizer)
    encoder = ChatEncoder(tokenizer)
    joined: list[Message] = []
    for message in messages:
        refuse_halves(message["content"])
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {**message, "content": joined_texts([joined[-1]["content"], message["content"]])}
        else:
            joined.append(message)
    try:
        return encoder.prompt(joined, "chat")
    except DataError:
        if joined[0]["role"] != "system" or len(joined) < 2:
            raise
        first = joined_texts(message["content"] for message in joined[:2])
        return encoder.prompt([{**joined[1], "content": first}, *joined[2:]], "chat")


def ends_of_turns(tokenizer: Any) -> frozenset[int]:
    """The special token with which the tokenizer's template ends an answer, which need not be the end token.

    A model that was trained on conversations ends with it: with ``<|im_end|>``, say, where texts end with ``</s>``.
    """
    behind = _behind_an_answer(tokenizer).lstrip()
    specials = [token for token in tokenizer.get_added_vocab() if behind.startswith(token)] if behind else []
    return frozenset([tokenizer.convert_tokens_to_ids(max(specials, key=len))] if specials else [])


def answering(sampling: Sampling, tokenizer: Any) -> Sampling:
    """The same settings for an answer in a conversation, which ends where the tokenizer's template ends it.

    That is a text to stop at where the tokenizer has no token for it, as for ``<|im_end|>`` in a vocabulary that was
    not resized.
    """
    text = _behind_an_answer(tokenizer)
    for token in tokenizer.get_added_vocab() if text else ():
        text = text.partition(token)[0]
    return dataclasses.replace(sampling, stop=(*sampling.stop, text.strip())) if text.strip() else sampling


def _behind_an_answer(tokenizer: Any) -> str:
    """What the tokenizer's template puts after an answer; nothing where there is no template, or it cannot be told."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
    try:
        text, _ = render(template_of(tokenizer) or "", tokenizer.special_tokens_map, talk, "chat")
    except DataError:  # a template that refuses this talk says so when it is asked for something
        return ""
    _, found, behind = text.rpartition(_MARK)
    return behind if found else ""


def refuse_without_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not say what a conversation looks like.

    Raises:
        DataError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "this model's tokenizer has no chat template, so it cannot chat; let it continue a text instead "
            "(`mixtral-recipes generate` without --chat; /v1/completions of a server)."
        )


def text_of(tokenizer: Any, messages: Sequence[Message], *, answer: bool = True) -> str:
    """Messages as the tokenizer's chat template has them.

    transformers' `apply_chat_template` does the same, with nothing that bounds what a template does.

    Args:
        tokenizer: Has the template.
        messages: The conversation.
        answer: Whether the beginning of an answer follows; otherwise the last message is left open, to be gone on with.

    Raises:
        DataError: there is no template, or it refuses these messages or takes too long.
    """
    refuse_without_template(tokenizer)
    special = tokenizer.special_tokens_map
    text, _ = render(template_of(tokenizer) or "", special, messages, "chat", prompt=answer)
    if answer:
        return text
    last = messages[-1]["content"].strip()
    before, found, _ = text.rpartition(last)
    if not found:
        raise DataError("chat: the chat template leaves out the last message, so it cannot be continued.")
    return before + found
