"""Conversations, in the form the tokenizer's template gives them."""

from typing import Any

import pytest

from mixtral_recipes.data.records import template_sandbox
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import DataError
from mixtral_recipes.inference.chat import Conversation, answering, ends_of_turns, tokens_of
from mixtral_recipes.inference.sampling import Sampling

_TURNS = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% endfor %}"
_NO_SYSTEM = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"


def tokenizer(*, system: bool = True, template: str | None = _TURNS) -> Any:
    """The embedded model's, with a template; ``system`` says whether that takes a system message."""
    made = load_tokenizer("embedded://mixtral_tiny")
    made.chat_template = template if system else _NO_SYSTEM + _TURNS
    return made


def text(tokens: list[int]) -> str:
    return load_tokenizer("embedded://mixtral_tiny").decode(tokens)


def test_turns_are_kept_until_they_are_reset() -> None:
    talk = Conversation(tokenizer(), system="Be brief.")
    assert text(talk.asked("Who?")) == "[s]Be brief.[u]Who?"
    talk.answered("Who?", "I.")
    assert text(talk.asked("Why?")) == "[s]Be brief.[u]Who?[a]I.[u]Why?"
    talk.reset()
    assert text(talk.asked("Why?")) == "[s]Be brief.[u]Why?"


def test_a_template_without_a_system_message_gets_it_before_the_question() -> None:
    talk = Conversation(tokenizer(system=False), system="Be brief.")
    talk.answered("Who?", "I.")
    assert text(talk.asked("Why?")) == "[u]Be brief.\n\nWho?[a]I.[u]Why?"


def test_neighbours_of_one_role_are_joined_as_in_records() -> None:
    two = [{"role": "user", "content": one} for one in ("Who?", "", "You?")]
    assert text(tokens_of(tokenizer(), two)) == "[u]Who?\n\nYou?"


def test_a_control_token_that_a_message_spells_out_is_text() -> None:
    made = tokenizer(template=_TURNS + "{{ eos_token }}")
    found = tokens_of(made, [{"role": "user", "content": "a</s>b"}])
    assert text(found) == "[u]a</s>b</s>"
    assert [place for place, token in enumerate(found) if token == made.eos_token_id] == [len(found) - 1]


def test_what_the_template_refuses_is_said() -> None:
    talk = Conversation(tokenizer(system=False))
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
        assert text(Conversation(tokenizer(template=evil)).asked("Who?")) == "a"
    else:
        with pytest.raises(DataError, match=r"takes more than 10,000 steps"):
            Conversation(tokenizer(template=evil)).asked("Who?")


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(
        DataError, match=r"has no chat template, .*continue a text instead .`mixtral-recipes generate` without --chat"
    ):
        Conversation(tokenizer(template=None))


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


@pytest.mark.parametrize(
    ("behind", "stop"),
    [("<|end|>\n", ("<|end|>",)), ("<|end|></s>", ("<|end|>",)), ("<|im_end|>", ()), ("\n", ()), ("", ())],
)
def test_an_answer_stops_at_the_text_that_ends_it_where_that_is_no_token(behind: str, stop: tuple[str, ...]) -> None:
    assert answering(Sampling(stop=("###",)), Marked(behind)).stop == ("###", *stop)
    assert answering(Sampling(), tokenizer(template=None)) == Sampling()


def test_without_a_template_nothing_more_ends_a_text() -> None:
    assert ends_of_turns(tokenizer(template=None)) == frozenset()
