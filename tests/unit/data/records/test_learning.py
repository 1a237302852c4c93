"""Fields and settings that say what is learned are obeyed."""

from typing import Any

import pytest

from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.conversations import conversation
from mixtral_recipes.data.records.pairs import PairTemplate
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.errors import DataError
from tests.chat_encoding import encode_one, learned_text

U, A = "user", "assistant"


def record(*fields: dict[str, Any], **beside: Any) -> Record:
    """Two turns of each; the fields of the assistant's first, its second, the user's first, ..."""
    given = [*fields, {}, {}, {}]
    turns = [
        {"role": U, "content": "q1", **given[2]},
        {"role": A, "content": "first", **given[0]},
        {"role": U, "content": "q2"},
        {"role": A, "content": "second", **given[1]},
    ]
    return Record({"messages": turns, **beside}, "x.jsonl:1")


def learned(tokenizer: Any, talk: Any, template: str | None = None) -> list[str]:
    return learned_text(tokenizer, encode_one(ChatEncoder(tokenizer, template), talk))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (({"weight": 0}, {"weight": 1}), ["second</s>"]),
        (({"weight": 0.0}, {}), ["second</s>"]),
        (({"weight": None}, {}), ["first</s>", "second</s>"]),
        (({"weight": "0"}, {"weight": "1"}), ["second</s>"]),  # as tables write them
        (({"weight": False}, {"weight": True}), ["second</s>"]),
        (({"train": "False"}, {"train": "true"}), ["second</s>"]),
        (({"weight": ""}, {}), ["first</s>", "second</s>"]),
        (({"train": False}, {}), ["second</s>"]),
        (({"training": False}, {"training": True}), ["second</s>"]),
        (({"mask": True}, {"mask": False}), ["second</s>"]),
        (({"loss": False}, {"loss": True}), ["second</s>"]),
        (({"loss": 0, "weight": 0}, {}), ["second</s>"]),
        (({}, {}, {"train": True}), ["q1", "first</s>", "second</s>"]),
        (({}, {}, {"weight": 1}), ["first</s>", "second</s>"]),
        (({}, {}, {"mask": False}), ["first</s>", "second</s>"]),
        (({"train_detail": [{"begin_offset": 0, "end_offset": 0, "train": False}]}, {}), ["irst</s>", "second</s>"]),
        (({}, {"train_detail": [{"begin_offset": 3, "end_offset": 5, "train": False}]}), ["first</s>", "sec"]),
        (({"train_detail": [], "train": False}, {}), ["second</s>"]),
    ],
)
def test_fields_of_turns(tokenizer: Any, fields: Any, expected: list[str]) -> None:
    found = learned(tokenizer, conversation(record(*fields)))
    if "irst</s>" in expected:  # a token may reach over the border
        found = [text.removeprefix("f") for text in found]
    if "sec" in expected:
        found[-1] = found[-1][:3]
        assert not found[-1].endswith("</s>")
    assert found == expected


@pytest.mark.parametrize(
    ("learn", "expected"),
    [
        (None, ["first</s>", "second</s>"]),
        ("all", ["first</s>", "second</s>"]),
        ("last", ["second</s>"]),
        ("completion", ["second</s>"]),
    ],
)
def test_the_setting(tokenizer: Any, learn: str | None, expected: list[str]) -> None:
    assert learned(tokenizer, conversation(record(), learn=learn)) == expected


@pytest.mark.parametrize(
    ("learn", "expected"), [(None, ["L</s>"]), ("completion", ["L</s>"]), ("all", ["H</s>", "L</s>"])]
)
def test_a_prompt_is_no_answer(tokenizer: Any, learn: str | None, expected: list[str]) -> None:
    prompt = [{"role": U, "content": "a"}, {"role": A, "content": "H"}, {"role": U, "content": "b"}]
    value = {"prompt": prompt, "completion": [{"role": A, "content": "L"}]}
    assert learned(tokenizer, conversation(Record(value, "x:1"), learn=learn)) == expected
    value["completion"] = "L"
    assert learned(tokenizer, conversation(Record(value, "x:1"), learn=learn)) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight": 0.5}, "'weight' is 0.5; it must be 0 or 1, true or false"),
        ({"train": "no"}, "'train' is 'no'"),
        ({"weight": 0, "train": True}, r"says both that it is learned and that it is not \(train=True, weight=0\)"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 5, "train": True}]},
         "'train_detail' says 0 to 5, but the text has"),
        ({"train_detail": "all"}, "'train_detail' must be a list"),
        ({"train_detail": [{"begin_offset": 0}]}, "'train_detail' needs begin_offset, end_offset and train"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=rf"^x.jsonl:1: messages\[1\]: {says}"):
        conversation(record(fields))


def test_a_record_can_say_it_too(tokenizer: Any) -> None:
    talk = conversation(record(weight=0))
    assert talk.left_out == "no turn to learn from"
    assert learned(tokenizer, talk) == []
    assert (
        PairTemplate().pair(Record({"input": "a", "output": "b", "train": False}, "x:1")).left_out
        == "excluded by the record"
    )
    assert PairTemplate().pair(Record({"input": "a", "output": "b", "weight": 1}, "x:1")).left_out == ""


def test_unknown_fields_are_named_with_their_count() -> None:
    talk = conversation(record({"score": 3}, {"score": 4}, id=7, source="x", empty=None))
    assert dict(talk.unused) == {"id": 1, "source": 1, "'score' of a turn": 2}
    pair = PairTemplate().pair(Record({"input": "a", "output": "b", "id": 1, "weight": 1}, "x:1"))
    assert pair.unused == ("id",)


def test_partly_learned_turns_are_the_same_without_marks(tokenizer: Any) -> None:
    bare = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}{% endfor %}"  # noqa: E501
    for fields in ({"weight": 0}, {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}):
        talk = conversation(record(fields))
        assert encode_one(ChatEncoder(tokenizer, bare), talk) == encode_one(ChatEncoder(tokenizer), talk)
