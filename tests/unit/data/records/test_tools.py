"""Tools and calls in OpenAI's and sharegpt's form become one thing."""

import json
from typing import Any

import pytest

from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.chat_templates import MIXTRAL_V3
from mixtral_recipes.data.records.conversations import conversation
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.errors import DataError
from tests.chat_encoding import encode_one

CALL = {"name": "get", "arguments": {"city": "x"}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "get", "description": "d", "parameters": PARAMETERS}}
OPENAI = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "abcdefghi",
                    "type": "function",
                    "function": {**CALL, "arguments": json.dumps(CALL["arguments"])},
                }
            ],
        },
        {"role": "tool", "name": "get", "tool_call_id": "abcdefghi", "content": '{"t": 21}'},
        {"role": "assistant", "content": "21."},
    ],
}
SHAREGPT = {
    "system": "Be brief.",
    "tools": json.dumps([TOOL["function"]]),
    "conversations": [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"t": 21}'},
        {"from": "gpt", "value": "21."},
    ],
}


def text_of(record: dict[str, Any], tokenizer: Any) -> str:
    talk = conversation(Record(record, "x:1"))
    return ChatEncoder(tokenizer, MIXTRAL_V3)._render(talk, "x:1").text


def test_both_forms_say_the_same(tokenizer: Any) -> None:
    expected = (
        f"<s>[AVAILABLE_TOOLS]{json.dumps([TOOL])}[/AVAILABLE_TOOLS][INST]Weather?[/INST]"
        '[TOOL_CALLS][{"name": "get", "arguments": {"city": "x"}, "id": "abcdefghi"}]</s>'
        '[TOOL_RESULTS]{"content": {"t": 21}, "call_id": "abcdefghi"}[/TOOL_RESULTS]21.</s>'
    )
    assert text_of(OPENAI, tokenizer) == expected
    sharegpt = text_of(SHAREGPT, tokenizer)
    assert sharegpt == expected.replace("abcdefghi", "call00000").replace("[INST]", "[INST]Be brief.\n\n")
    talk = conversation(Record(SHAREGPT, "x:1"))
    assert talk.learned == [False, False, True, False, True]
    assert not talk.unused


def test_identifiers_are_mistrals(tokenizer: Any) -> None:
    record = json.loads(json.dumps(OPENAI).replace("abcdefghi", "call_ABC-12345678"))
    assert '"id": "C12345678"' in text_of(record, tokenizer)
    assert '"call_id": "C12345678"' in text_of(record, tokenizer)


def test_several_calls_and_results_without_identifiers() -> None:
    turns = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": json.dumps([CALL, CALL])},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "two"},
        {"from": "gpt", "value": "3"},
    ]
    talk = conversation(Record({"conversations": turns}, "x:1"))
    calls = [call["id"] for call in talk.messages[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in talk.messages[2:4]] == calls
    assert [message["result"] for message in talk.messages[2:4]] == [1, "two"]
    assert len(set(calls)) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\] is not a tool"),
        ({"tools": [{"name": "x", "parameters": "?"}]}, r"tools\[0\].parameters is str"),
        ({"messages": OPENAI["messages"][:1] + OPENAI["messages"][2:]}, "this tool result belongs to no earlier call"),
        ({"messages": [OPENAI["messages"][0], {"role": "assistant", "tool_calls": ["?"]}]}, "is not a tool call"),
        ({"messages": [{"role": "user", "content": "?", "tool_calls": [CALL]}]}, "only the assistant can call tools"),
    ],
)
def test_what_is_no_tool_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=f"^x:1: .*{says}"):
        conversation(Record({**OPENAI, **change}, "x:1"))


def test_version_1_has_no_tools(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer)
    for record in (OPENAI, {**OPENAI, "tools": []}):
        talk = conversation(Record(record, "x:1"))
        with pytest.raises(DataError, match=r"^x:1: has tool.*which this chat template cannot encode \(version 1"):
            encode_one(encoder, talk, "x:1")
    talk = conversation(Record({"tools": [TOOL], "prompt": "a", "completion": "b"}, "x:1"), {"tools": None})
    assert not talk.tools
    assert dict(talk.unused) == {}
    assert encode_one(encoder, talk)


def test_text_beside_a_call_is_refused_by_name(tokenizer: Any) -> None:
    record = json.loads(json.dumps(OPENAI))
    record["messages"][1]["content"] = "Let me look."
    with pytest.raises(DataError, match="a turn holds text and tool calls, of which Mixtral knows one at a time"):
        encode_one(ChatEncoder(tokenizer, MIXTRAL_V3), conversation(Record(record, "x:1")), "x:1")


# ChatML as many have it: calls as JSON between markers of their own, and no word on what the assistant says.
CHATML_TOOLS = """
{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_calls_of_a_template_that_marks_nothing(tokenizer: Any) -> None:
    record = json.loads(json.dumps(OPENAI))
    record["messages"][1]["content"] = "Let me look."
    rendered = ChatEncoder(tokenizer, CHATML_TOOLS)._render(conversation(Record(record, "x:1")), "x:1")
    assert [[rendered.text[a:b] for a, b in turn] for turn in rendered.turns] == [
        ['Let me look.<tool_call>{"name": "get", "arguments": {"city": "x"}}</tool_call><|im_end|>'],
        ["21.<|im_end|>"],
    ]
    record["messages"][1]["weight"] = 0
    rendered = ChatEncoder(tokenizer, CHATML_TOOLS)._render(conversation(Record(record, "x:1")), "x:1")
    assert len(rendered.turns) == 1


def test_calls_that_cannot_be_found_are_refused(tokenizer: Any) -> None:
    """A template that writes a turn differently once another one follows, and one that leaves calls out."""
    talk = conversation(Record(OPENAI, "x:1"))
    later = (
        CHATML_TOOLS.replace("'<tool_call>'", "('<later>' if not loop.last else '<last>')")
        .replace("{%- for call", "{%- set loop_of = loop %}{%- for call")
        .replace("not loop.last", "not loop_of.last")
    )
    silent = CHATML_TOOLS.replace("'<tool_call>' + (call.function | tojson) + '</tool_call>'", "''")
    for template in (later, silent):
        with pytest.raises(DataError, match="does not show where they begin and end; mark the assistant's part"):
            encode_one(ChatEncoder(tokenizer, template), talk, "x:1")


def test_fields_of_turns_that_are_not_read_are_named() -> None:
    turns = [
        {"from": "human", "value": "a", "content": "b", "tool_call_id": "1"},
        {"from": "gpt", "value": "c", "tool_calls": [], "function_call": None},
    ]
    value = {"conversations": turns, "system": "s", "system_prompt": "t", "tools": [TOOL], "functions": [TOOL]}
    talk = conversation(Record(value, "x:1"))
    assert [message["content"] for message in talk.messages] == ["s", "b", "c"]
    assert set(talk.unused) == {"'value' of a turn", "'tool_call_id' of a turn", "system_prompt", "functions"}


def test_empty_entries_of_tables_are_no_parameters(tokenizer: Any) -> None:
    """Parquet gives every row all fields of a struct."""
    record = json.loads(json.dumps(OPENAI))
    record["tools"][0]["function"]["parameters"]["properties"]["other"] = None
    record["messages"][1]["tool_calls"][0]["function"]["arguments"] = {**CALL["arguments"], "other": None}
    record["messages"][0]["tool_calls"] = None
    assert text_of(record, tokenizer) == text_of(OPENAI, tokenizer)
    talk = conversation(Record(record, "x:1", json.dumps(record)))  # JSON says what it means
    assert talk.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "x", "other": None}
