"""Chat encoding against mistral-common's tokens and transformers' assistant mask, on random conversations."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtral_recipes.data.records.chat_encoder import ChatEncoder
from mixtral_recipes.data.records.conversations import Message, conversation
from mixtral_recipes.data.records.record import Record
from mixtral_recipes.data.tokenizers import load_tokenizer
from mixtral_recipes.inference.chat import tokens_of
from tests.chat_encoding import encode_one

mistral_common = pytest.importorskip("mistral_common", reason="mistral-common is not installed")

FILES = {
    "mixtral-8x7b-instruct": "tokenizer.model.v1",
    "mixtral-8x22b-instruct": "mistral_instruct_tokenizer_240323.model.v3",
}
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Ordinary text, and everything a tokenizer trips over: runs of spaces, control tokens spelled out, other scripts.
_ODD = ["Hello", "hi", " ", "  ", "\n", "\t", "'s", ".", "1234", "x=1", "wörld", "日本", "🙂", "▁", "<0x0A>", "\u200d"]
_CONTROL = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[", "]"]
pieces = st.sampled_from([*_ODD, *_CONTROL])
contents = st.one_of(st.lists(pieces, min_size=1, max_size=8).map("".join), st.text(max_size=30)).filter(
    lambda text: bool(text.strip()) and "\ue00a" not in text and "\ue00b" not in text
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    system = draw(st.booleans())
    messages = [{"role": "system", "content": draw(contents)}] if system else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
    return messages


names = st.text("abcdefgh_", min_size=1, max_size=8)
values = st.recursive(
    st.booleans() | st.integers(-5, 5) | contents,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
)
arguments = st.dictionaries(names, values, max_size=2)
tools = st.builds(
    lambda name, description, fields: {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {field: {"type": "string"} for field in fields}},
        },
    },
    names,
    contents,
    st.lists(names, max_size=2),
)


@st.composite
def weighted(draw: st.DrawFn, *, calls: bool) -> dict[str, Any]:
    """A record in OpenAI's form: weights, a system prompt, and, where they are wanted, tools, calls and results."""
    messages = draw(conversations())
    record: dict[str, Any] = {"messages": []}
    for message in messages:
        if message["role"] == "assistant":
            if calls and draw(st.booleans()):
                ids = draw(st.lists(st.text("abcXYZ019", min_size=9, max_size=9), min_size=1, max_size=2, unique=True))
                said = [{"name": draw(names), "arguments": json.dumps(draw(arguments))} for _ in ids]
                made = [{"id": i, "type": "function", "function": f} for i, f in zip(ids, said, strict=True)]
                record["messages"].append({"role": "assistant", "tool_calls": made, "weight": draw(st.integers(0, 1))})
                for i in ids:
                    result = draw(st.one_of(contents, arguments.map(json.dumps)))
                    record["messages"].append({"role": "tool", "tool_call_id": i, "content": result})
            message = {**message, "weight": draw(st.integers(0, 1))}
        record["messages"].append(message)
    if calls:
        record["tools"] = draw(st.lists(tools, max_size=2))
    return record


RECORDS = st.tuples(weighted(calls=False), weighted(calls=True))  # for the earlier format, and for the one with tools


def package_file(name: str) -> Path:
    return Path(mistral_common.__file__).parent / "data" / FILES[name]


@pytest.fixture(scope="module", params=list(FILES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name: str) -> Any:
    return load_tokenizer(f"mistral://{name}")


@pytest.fixture(scope="module")
def mistral(name: str) -> Any:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(package_file(name)), mode=ValidationMode.finetuning)


@EXAMPLES
@given(messages=conversations())
def test_tokens_are_mistral_commons(tokenizer: Any, mistral: Any, messages: list[Message]) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    request = ChatCompletionRequest.from_openai(messages=copy.deepcopy(messages))
    expected = mistral.encode_chat_completion(request).tokens
    assert encode_one(ChatEncoder(tokenizer), messages).tokens == expected


parts = st.lists(contents | st.just(""), min_size=1, max_size=3).filter(any)
some = contents | parts.map(lambda texts: [{"type": "text", "text": text} for text in texts])


@EXAMPLES
@given(roles=st.lists(st.sampled_from(["user", "assistant"]), max_size=5), said=st.lists(some, min_size=8, max_size=8))
def test_parts_and_neighbours_are_joined_as_mistral_common_joins_them(
    tokenizer: Any, mistral: Any, roles: list[str], said: list[Any]
) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    roles = ["system", "user", *roles, "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    request = ChatCompletionRequest.from_openai(messages=copy.deepcopy(messages))
    encoded = encode_one(ChatEncoder(tokenizer), conversation(Record({"messages": messages}, "x:1")))
    assert encoded.tokens == mistral.encode_chat_completion(request).tokens


@EXAMPLES
@given(messages=conversations())
def test_what_is_asked_is_what_stands_before_the_answer_in_training(tokenizer: Any, messages: list[Message]) -> None:
    talk = conversation(Record({"messages": messages}, "x:1"), learn="last")
    encoded = encode_one(ChatEncoder(tokenizer), talk)
    asked = tokens_of(tokenizer, messages[:-1])
    assert asked == encoded.tokens[: encoded.learned.index(True)]


@EXAMPLES
@given(records=RECORDS)
def test_tokens_and_masks_of_weights_tools_and_systems(
    tokenizer: Any, mistral: Any, name: str, records: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Token by token mistral-common's; learned are the turns of weight 1, found from the tokens of each turn."""
    from mistral_common.protocol.instruct.messages import AssistantMessage
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    record = records["22b" in name]
    plain = [{k: v for k, v in message.items() if k != "weight"} for message in record["messages"]]
    request = ChatCompletionRequest.from_openai(messages=copy.deepcopy(plain), tools=record.get("tools") or None)
    expected = mistral.encode_chat_completion(request).tokens
    encoded = encode_one(ChatEncoder(tokenizer), conversation(Record(record, "x:1")))
    assert encoded.tokens == expected
    inner = mistral.instruct_tokenizer
    normal = InstructRequestNormalizer.normalizer().from_chat_completion_request(request)
    turns = [inner.encode_assistant_message(m, False) for m in normal.messages if isinstance(m, AssistantMessage)]
    weights = [message["weight"] for message in record["messages"] if message["role"] == "assistant"]
    at, mask = 0, [False] * len(expected)
    for tokens, weight in zip(turns, weights, strict=True):
        while expected[at : at + len(tokens)] != tokens or not _begins(expected, at, inner):
            at += 1
        mask[at : at + len(tokens)] = [bool(weight)] * len(tokens)
        at += len(tokens)
    assert encoded.learned == mask


def _begins(tokens: list[int], at: int, inner: Any) -> bool:
    """Whether an assistant's turn may begin here: behind the end of a user's turn or of a tool's result."""
    if hasattr(inner, "END_INST"):
        return tokens[at - 1] in (inner.END_INST, inner.END_TOOL_RESULTS)
    return inner.tokenizer.decode(tokens[:at]).endswith("[/INST]")


@EXAMPLES
@given(records=RECORDS)
def test_mask_is_transformers_assistant_mask(
    tokenizer: Any, name: str, records: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Of transformers' mask, which is of all the assistant's turns, those of weight 0 are taken out turn by turn."""
    text = json.dumps(records["22b" in name])
    for token in tokenizer.added_tokens_decoder.values():  # spelled out, they are tokens to transformers and text to us
        text = text.replace(token.content, "x")
    talk = conversation(Record(json.loads(text), "x:1"))
    expected = tokenizer.apply_chat_template(
        talk.messages,
        tools=talk.tools or None,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenize=True,
    )
    encoded = encode_one(ChatEncoder(tokenizer), talk)
    assert encoded.tokens == expected["input_ids"]
    weights = iter(
        [w for message, w in zip(talk.messages, talk.learned, strict=True) if message["role"] == "assistant"]
    )
    mask: list[bool] = []
    weight: Any = False
    for of_assistant, follows in zip(expected["assistant_masks"], [0, *expected["assistant_masks"]], strict=False):
        if of_assistant and not follows:
            weight = next(weights)
        mask.append(bool(of_assistant and weight))
    assert encoded.learned == mask


@EXAMPLES
@given(records=RECORDS)
def test_mask_is_the_same_without_marks_in_the_template(
    tokenizer: Any, name: str, records: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Tool calls are found where the template puts tools and the system prompt at the last message of the user."""
    marked = ChatEncoder(tokenizer)
    bare = marked.template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    talk = conversation(Record(records["22b" in name], "x:1"))
    assert encode_one(ChatEncoder(tokenizer, bare), talk) == encode_one(marked, talk)


@EXAMPLES
@given(text=st.one_of(st.lists(pieces, max_size=12).map("".join), st.text(max_size=60)))
def test_text_is_split_as_sentencepiece_splits_it(tokenizer: Any, name: str, text: str) -> None:
    model = _sentencepiece(name)
    if "\0" in text:  # ends a C string
        return
    assert tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) == model.encode(text)


_models: dict[str, Any] = {}


def _sentencepiece(name: str) -> Any:
    if name not in _models:
        from sentencepiece import SentencePieceProcessor

        _models[name] = SentencePieceProcessor(model_file=str(package_file(name)))
    return _models[name]


def test_tokenizer_survives_saving(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    talk = [{"role": "user", "content": " two  spaces"}, {"role": "assistant", "content": "ok </s>"}]
    assert encode_one(ChatEncoder(again), talk) == encode_one(ChatEncoder(tokenizer), talk)
    assert again.chat_template == tokenizer.chat_template
