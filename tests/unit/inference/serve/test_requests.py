"""Each field of a request is read, known to do nothing, or refused by its name."""

import json
from typing import Any

import pytest

from mixtral_recipes.inference.serve.requests import Chat, Completion, Refused, new_tokens, parsed

PLAIN = {"model": "m", "prompt": "Hi"}
TALK = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


def completion(**fields: Any) -> Completion:
    return parsed(Completion, json.dumps(PLAIN | fields).encode())


def chat(**fields: Any) -> Chat:
    return parsed(Chat, json.dumps(TALK | fields).encode())


def test_what_is_read() -> None:
    found = completion(temperature=0.5, top_k=-1, top_p=0.9, stop="\n", seed=-3, repetition_penalty=1.1).sampling(7)
    assert (found.max_new_tokens, found.temperature, found.top_k, found.top_p) == (7, 0.5, 0, 0.9)
    assert (found.stop, found.seed, found.repetition_penalty) == (("\n",), -3, 1.1)
    found = completion(presence_penalty=-2, frequency_penalty=0.5, logit_bias={"3": -100, "5": 1.5}).sampling(7, 4)
    assert (found.presence_penalty, found.frequency_penalty) == (-2, 0.5)
    assert (found.logit_bias, found.logprobs) == (((3, -100), (5, 1.5)), 4)
    assert completion().sampling(1).temperature == 1.0
    assert completion().sampling(1).continues
    assert not chat().sampling(1).continues
    assert completion().sampling(1).seed != completion().sampling(1).seed


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ([1, 2], [[1, 2]]), (["a", "b"], ["a", "b"]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_parts_and_roles_of_messages() -> None:
    parts = [{"type": "text", "text": one} for one in ("a", "", "b")]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert chat(messages=messages).turns == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\n\nb"},
    ]


def test_an_answer_comes_back_as_its_client_keeps_it() -> None:
    answer = {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "audio": None,
        "tool_calls": [],
        "annotations": [],
    }
    messages = [*TALK["messages"], answer, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}]
    assert [turn["content"] for turn in chat(messages=messages).turns] == ["Hi", "Yes.", "Why?"]
    with pytest.raises(Refused, match=r"messages\.1\.tool_calls: "):
        chat(messages=[*TALK["messages"], answer | {"tool_calls": [{"id": "a"}]}])


def test_what_asks_for_nothing_is_taken() -> None:
    completion(user="me", logprobs=None, best_of=1, echo=False, presence_penalty=0.0, logit_bias={}, suffix=None)
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, metadata={"a": "b"}, top_logprobs=0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"more": 1}}, "stream_options.more"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": "a"}, "presence_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"temprature": 0.5}, "temprature"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_what_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as told:
        completion(**fields)
    assert told.value.status == 400
    assert (told.value.param or "").startswith(param)
    assert str(told.value).startswith(param)


def test_the_likeliest_tokens_go_with_likelihoods() -> None:
    assert chat(logprobs=True, top_logprobs=3).top_logprobs == 3
    with pytest.raises(Refused, match="top_logprobs: only valid with logprobs=true") as told:
        chat(top_logprobs=3)
    assert told.value.param == "top_logprobs"


def test_of_a_field_with_several_forms_it_is_said_what_is_wrong_in_the_nearest() -> None:
    for fields, says in (({"stop": ["a"] * 17}, "at most 16 items"), ({"stop": ["a", ""]}, "at least 1 character")):
        with pytest.raises(Refused, match=says):
            completion(**fields)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ([{"role": "king", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages.0.tool_calls"),
        ([{"role": "tool", "tool_call_id": "a", "content": "b"}], "messages.0.role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "text", "text": "a", "more": 1}]}], "messages.0.content.more"),
    ],
)
def test_messages_that_are_refused(messages: Any, param: str) -> None:
    with pytest.raises(Refused) as told:
        chat(messages=messages)
    assert (told.value.param or "").startswith(param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"model": NaN}'])
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(Refused):
        parsed(Completion, body)


def test_a_byte_order_mark_is_no_part_of_a_request() -> None:
    assert parsed(Completion, b"\xef\xbb\xbf" + json.dumps(PLAIN).encode()).model == "m"


def test_room_for_new_tokens() -> None:
    assert new_tokens(10, 90, 100) == 10
    assert new_tokens(None, 90, 100) == 10
    assert new_tokens(None, 10, 100, otherwise=16) == 16
    assert new_tokens(None, 90, 100, otherwise=16) == 10
    for asked, prompt in ((11, 90), (None, 100), (1, 200)):
        with pytest.raises(Refused, match="maximum context length is 100 tokens") as told:
            new_tokens(asked, prompt, 100)
        assert told.value.code == "context_length_exceeded"
