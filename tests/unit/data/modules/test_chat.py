"""Conversations in every shape, and the tokens that are learned."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mixtral_recipes.data.modules.chat import ChatDataModule
from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.conversations import conversation
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.errors import DataError
from tests.chat_encoding import encode_one, learned_text

U, A, S = "user", "assistant", "system"
# Templates as they are found on the Hub: without marks, with other control tokens, stripping messages.
PLAIN_MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
STRIPPING = (
    "{{ bos_token }}{% for m in messages %}{{ '# ' + m['role'] + '\n' + m['content'] | trim + eos_token + '\n' }}"
    "{% endfor %}"
)
BACKWARDS = "{% for m in messages %}{{ m['content'] | reverse }}{% endfor %}"
FIRST_WORDS = "{% for m in messages %}{{ m['content'][:5] }}{% endfor %}"


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


TWO_TURNS = messages((U, "Hi"), (A, "Hello there"), (U, "Bye"), (A, "See you"))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": TWO_TURNS}, TWO_TURNS),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
            messages((U, "Hi"), (A, "Yes")),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"role": "user", "content": "Hi"},
                    {"from": "gpt", "value": "Yes"},
                ]
            },
            messages((S, "S"), (U, "Hi"), (A, "Yes")),
        ),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, messages((U, "Add\n\n1 2"), (A, "3"))),
        ({"instruction": "Add", "input": "", "output": "3", "system": "S"}, messages((S, "S"), (U, "Add"), (A, "3"))),
        ({"instruction": "Add", "input": " ", "output": "3", "system": "\n"}, messages((U, "Add"), (A, "3"))),
        ({"messages": messages((S, " "), (U, "Hi"), (A, "Yes"))}, messages((U, "Hi"), (A, "Yes"))),
        (
            {"system": "S", "messages": messages((S, "S\n"), (U, "Hi"), (A, "Yes"))},
            messages((S, "S\n"), (U, "Hi"), (A, "Yes")),
        ),
        (
            {"instruction": "c", "output": "d", "history": [["a", "b"]]},
            messages((U, "a"), (A, "b"), (U, "c"), (A, "d")),
        ),
        ({"prompt": messages((U, "Hi")), "completion": messages((A, "Yes"))}, messages((U, "Hi"), (A, "Yes"))),
        ({"prompt": "Hi", "completion": "Yes"}, messages((U, "Hi"), (A, "Yes"))),
        ({"messages": messages((U, "a"), (U, "b"), (A, "c"))}, messages((U, "a\n\nb"), (A, "c"))),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *messages((A, "b"))]},
            messages((U, "a"), (A, "b")),
        ),
    ],
)
def test_shapes(record: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert conversation(Record(record, "x:1")).messages == expected


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": []}, "'messages' must be a list of messages, but is empty"),
        ({"messages": "Hi"}, "'messages' must be a list of messages, but is not one"),
        ({"messages": ["Hi", 5]}, "messages[0] is not an object"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "messages[0] has the unknown role 'narrator'"),
        ({"messages": [{"role": U}]}, "'messages[0].content' is missing"),
        ({"messages": messages((U, "a"), (A, ""))}, "'messages[1].content' is empty"),
        ({"messages": messages((U, "a"), (A, 5))}, "'messages[1].content' is int, not text"),  # pyright: ignore[reportArgumentType]
        ({"messages": messages((A, "a"))}, "must start with the user, not assistant"),
        ({"messages": messages((U, "a"))}, "has no assistant message to learn"),
        ({"messages": messages((U, "a"), (S, "s"), (A, "b"))}, "a system message comes after the first user message"),
        (
            {"messages": [{"role": U, "content": [{"type": "image"}]}]},
            "messages[0] has a part of type 'image', but only text",
        ),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "output": "b", "history": 5}, "'history' must be a list of pairs of texts"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "'history' must be a list of pairs of texts"),
        ({"text": "a"}, "not a conversation: needs 'messages'"),
    ],
)
def test_bad_conversations(record: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        conversation(Record(record, "x.jsonl:3"))
    assert str(caught.value).startswith("x.jsonl:3: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("template", [None, PLAIN_MIXTRAL, STRIPPING])
def test_the_assistant_is_learned_under_any_template(tokenizer: Any, template: str | None) -> None:
    encoder = ChatEncoder(tokenizer, template)
    assert learned_text(tokenizer, encode_one(encoder, TWO_TURNS)) == ["Hello there</s>", "See you</s>"]
    # An answer that repeats the question, or the template's own words, is not mistaken for it.
    repeated = messages((U, "INST"), (A, "INST"), (U, "a"), (A, " a "))
    assert learned_text(tokenizer, encode_one(encoder, repeated))[0] == "INST</s>"
    assert len(learned_text(tokenizer, encode_one(encoder, repeated))) == 2


@pytest.mark.parametrize("template", [None, PLAIN_MIXTRAL, STRIPPING])
def test_control_tokens_in_messages_are_text(tokenizer: Any, template: str | None) -> None:
    talk = messages((U, "What is </s>?"), (A, "It ends <s>a sentence</s>."))
    encoded = encode_one(ChatEncoder(tokenizer, template), talk)
    assert encoded.tokens.count(tokenizer.bos_token_id) == 1
    assert encoded.tokens.count(tokenizer.eos_token_id) == (1 if template != STRIPPING else 2)
    assert learned_text(tokenizer, encoded) == ["It ends <s>a sentence</s>.</s>"]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_control_token_in_a_message_leaves_the_other_messages_as_they_are(scheme: str) -> None:
    """Tokenizers differ in whether a space is put before each part of a text, or before the text only."""
    published = load_tokenizer("mistral://mixtral-8x22b-instruct")
    file = json.loads(published.backend_tokenizer.to_str())
    file |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(file)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    encoder = ChatEncoder(tokenizer, published.chat_template)
    plain, spelled = (
        encode_one(encoder, messages((U, f"What is {what}, in XML?"), (A, "日本 an end"), (U, " Why? "), (A, "fine")))
        for what in ("<x>", "</s>")
    )
    places = [encoded.learned.index(True) for encoded in (plain, spelled)]
    assert spelled.tokens[places[1] :] == plain.tokens[places[0] :]
    assert spelled.learned[places[1] :] == plain.learned[places[0] :]
    assert spelled.tokens[:4] == plain.tokens[:4]


@pytest.mark.parametrize("template", [BACKWARDS, FIRST_WORDS])
def test_template_that_changes_messages_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(DataError, match=r"mark it in the template with \{% generation %\}"):
        encode_one(ChatEncoder(tokenizer, template), TWO_TURNS)


def test_template_that_raises_names_the_record(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"x:1: the chat template refuses this conversation \(roles must alternate"):
        encode_one(ChatEncoder(tokenizer, "{{ raise_exception('roles must alternate') }}"), TWO_TURNS, "x:1")


@pytest.mark.parametrize("mark", ["\U000f5a0a", "\U000f5a0b", "\U000f5a0c", "\U000f5a0d"])
def test_a_character_that_marks_are_made_of_is_refused(tokenizer: Any, mark: str) -> None:
    said = [{"role": "user", "content": f"a </s> {mark}7{mark}"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=rf"x:1: has the character U\+{ord(mark):X}"):
        encode_one(ChatEncoder(tokenizer, "chatml"), said, "x:1")


def test_module_reads_a_file_and_cuts_the_end(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": TWO_TURNS}) + "\n" for _ in range(10)))
    whole = encode_one(ChatEncoder(tokenizer), TWO_TURNS)
    length = len(whole.tokens) - 4
    module = ChatDataModule(dataset_root=path, seq_length=length, val_proportion=0.2)
    module.setup(tokenizer)
    assert [len(module._sets[name]) for name in ("train", "validation")] == [8, 2]  # pyright: ignore[reportArgumentType]
    sample = module._sets["train"][0]
    assert sample["tokens"].tolist() == whole.tokens[: length + 1]
    assert np.array_equal(sample["loss_mask"], whole.learned[1 : length + 1])


def test_an_end_of_turn_that_is_no_token_is_learned(tokenizer: Any) -> None:
    """As it must be, or the model never ends its turn."""
    encoded = encode_one(ChatEncoder(tokenizer, CHATML), TWO_TURNS)
    assert learned_text(tokenizer, encoded) == ["Hello there<|im_end|>", "See you<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN_MIXTRAL, ["\n  a\n</s>", "\tb \t</s>"]),
        (CHATML, ["\n  a\n<|im_end|>", "\tb \t<|im_end|>"]),
        (STRIPPING, ["a</s>", "b</s>"]),
    ],
)
def test_outer_spaces_of_an_answer_are_learned_with_what_ends_it(
    tokenizer: Any, template: str, expected: list[str]
) -> None:
    """Those that the template keeps; its own line break before an answer is not one of them."""
    talk = messages((U, "Hi\n"), (A, "\n  a\n"), (U, "\nBye"), (A, "\tb \t"))
    encoded = encode_one(ChatEncoder(tokenizer, template), talk)
    pieces = [""]
    for token, learned in zip(encoded.tokens, encoded.learned, strict=True):
        pieces[-1] += tokenizer.decode([tokenizer.bos_token_id, token]).removeprefix("<s>") if learned else ""
        pieces += [] if learned or not pieces[-1] else [""]
    assert [piece.removeprefix(" ") if template == PLAIN_MIXTRAL else piece for piece in pieces if piece] == expected


def test_template_file(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "chat.jinja").write_text(PLAIN_MIXTRAL)
    assert ChatEncoder(tokenizer, str(tmp_path / "chat.jinja")).template == PLAIN_MIXTRAL


def test_templates_by_name(tokenizer: Any) -> None:
    assert learned_text(tokenizer, encode_one(ChatEncoder(tokenizer, "chatml"), TWO_TURNS)) == [
        "Hello there<|im_end|>",
        "See you<|im_end|>",
    ]
    assert encode_one(ChatEncoder(tokenizer, "mixtral"), TWO_TURNS) == encode_one(ChatEncoder(tokenizer), TWO_TURNS)
    with pytest.raises(DataError, match=r"chat_template='chatlm': no such file.*Did you mean 'chatml'"):
        ChatEncoder(tokenizer, "chatlm")
