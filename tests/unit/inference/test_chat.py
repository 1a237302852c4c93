"""Conversations, in the form the tokenizer's template gives them."""

import pytest

from mixtral_recipes.data.records import template_sandbox
from mixtral_recipes.errors import DataError
from mixtral_recipes.inference.chat import Conversation, ends_of_turns

_TURNS = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
_NO_SYSTEM = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"


class Tokenizer:
    """One character a token; ``system`` says whether its template takes one."""

    def __init__(self, *, system: bool = True, template: str | None = _TURNS) -> None:
        self.chat_template = template if system else _NO_SYSTEM + _TURNS
        self.special_tokens_map: dict[str, str] = {}

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(c) for c in text]}


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


@pytest.mark.parametrize(
    "condition",
    ["lipsum is defined", "strftime_now('%f') is defined", "[true, true]|random"],  # what tells one run from another
)
def test_a_template_without_end_is_refused(condition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MOST_STEPS", 10_000)
    endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}"
    evil = f"{{% if {condition} %}}{endless}{{% endif %}}a"
    if condition == "lipsum is defined":  # it is not where templates run here, and nothing else runs them
        assert text(Conversation(Tokenizer(template=evil)).asked("Who?")) == "a"
    else:
        with pytest.raises(DataError, match=r"takes more than 10,000 steps"):
            Conversation(Tokenizer(template=evil)).asked("Who?")


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(
        DataError, match=r"has no chat template, .*continue a text instead .`mixtral-recipes generate` without --chat"
    ):
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
