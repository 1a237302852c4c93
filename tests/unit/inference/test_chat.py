"""Conversations, in the form the tokenizer's template gives them."""

from typing import Any

import pytest

from mixtral_recipes.errors import DataError
from mixtral_recipes.inference.chat import Conversation, ends_of_turns


class Tokenizer:
    """Renders messages as transformers' tokenizers do, one character a token; ``system`` says whether it takes one."""

    def __init__(self, *, system: bool = True, template: str | None = "there") -> None:
        self.chat_template = template
        self.special_tokens_map: dict[str, str] = {}
        self._system = system

    def apply_chat_template(self, messages: list[dict[str, str]], **settings: Any) -> list[int]:
        assert settings == {"add_generation_prompt": True, "return_dict": False}
        if not self._system and messages[0]["role"] != "user":
            raise ValueError("Conversation roles must alternate user/assistant")
        return [ord(c) for m in messages for c in f"[{m['role'][0]}]{m['content']}"]


def text(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def test_turns_are_kept_until_they_are_reset() -> None:
    talk = Conversation(Tokenizer(), system="Be brief.")
    assert text(talk.asked("Who?")) == "[s]Be brief.[u]Who?"
    talk.answered("Who?", "I.")
    assert text(talk.asked("Why?")) == "[s]Be brief.[u]Who?[a]I.[u]Why?"
    talk.reset()
    assert text(talk.asked("Why?")) == "[s]Be brief.[u]Why?"


def test_a_template_without_a_system_message_gets_it_before_the_question() -> None:
    talk = Conversation(Tokenizer(system=False), system="Be brief.")
    talk.answered("Who?", "I.")
    assert text(talk.asked("Why?")) == "[u]Be brief.\n\nWho?[a]I.[u]Why?"


def test_what_the_template_refuses_is_said() -> None:
    talk = Conversation(Tokenizer(system=False))
    talk.messages = [{"role": "assistant", "content": "I."}]
    with pytest.raises(DataError, match=r"the chat template refuses this conversation .*must alternate"):
        talk.asked("Who?")


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        Conversation(Tokenizer(template=None))


class Marked:
    """A tokenizer whose template ends answers with a token of its own."""

    def __init__(self, behind: str) -> None:
        self.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + behind + "{% endfor %}"
        )
        self.special_tokens_map: dict[str, str] = {}

    def get_added_vocab(self) -> dict[str, int]:
        return {"</s>": 2, "<|im_end|>": 32001, "<|im_end": 5}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_added_vocab()[token]


@pytest.mark.parametrize(("behind", "ends"), [("<|im_end|>\n", {32001}), (" </s>", {2}), ("\n", set()), ("", set())])
def test_what_ends_an_answer(behind: str, ends: set[int]) -> None:
    assert ends_of_turns(Marked(behind)) == ends


def test_without_a_template_nothing_more_ends_a_text() -> None:
    assert ends_of_turns(Tokenizer(template=None)) == frozenset()
