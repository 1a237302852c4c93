"""The forms records come in, told by the fields one record has."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from mixtral_recipes.data.records.learning import yes_or_no
from mixtral_recipes.data.records.record import is_filled, may_hold

# Names people give to prompts and answers, most telling first.
PAIR_COLUMNS = (
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("question", "solution"),
    ("problem", "solution"),
    ("query", "response"),
    ("query", "answer"),
    ("source", "target"),
    ("inputs", "targets"),
)

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
# What belongs to the prompt of a pair, and stands in columns of its own.
BESIDE_A_PROMPT = ("input", "context", "history")

# What people call the answer that lost, and answers of which one is to win.
_LOST = re.compile(r"(rejected|reject|dispreferred|non_preferred)(_\w+)?", re.IGNORECASE)
_RIVAL = re.compile(r"(response|output|answer|completion|conversation)_?(0|1|2|a|b|j|k)", re.IGNORECASE)
_VERDICTS = ("label", "kto_tag")

# Forms of well-known data sets that are to be written otherwise first: fields, and how.
_TO_REWRITE = {
    ("query", "answers", "tools"): "xlam's function calls: write `messages` (the query, and the answers as the "
    "assistant's `tool_calls`), and `tools` in OpenAI's form",
    ("system", "chat"): "glaive's function calls: split the text of `chat` at USER:, ASSISTANT: and FUNCTION RESPONSE: "
    "into `messages`, and put the functions that `system` names into `tools`",
    ("question", "annotations", "document"): "Natural Questions: write the text of each question and of a short answer "
    "as `input` and `output`",
    ("translation",): "texts in several languages: write one language's as `input` and the other's as `output`",
    ("segments",): "Axolotl's segments: write what is not learned (label: false) as `input` and what is as `output`",
}


class Form(StrEnum):
    """What a record is."""

    squad = "SQuAD"
    messages = "messages"
    sharegpt = "sharegpt"
    prompt_completion = "prompt and completion messages"
    alpaca = "alpaca"
    dolly = "instruction, context, response"
    pairs = "prompts and answers"
    message = "single messages"
    text = "documents"
    preference = "preference pairs"


def form_of(record: Mapping[str, Any]) -> Form | None:
    """A record's form; None where its fields are of no known one. A field that is null counts as absent."""
    there = {name for name, value in record.items() if value is not None}
    if {"context", "question"} <= there and ("answers" in there or yes_or_no(record.get("is_impossible"))):
        return Form.squad
    if "paragraphs" in there:
        return Form.squad
    if is_preference(record):
        return Form.preference
    if "messages" in there:
        return Form.messages
    if "conversations" in there:
        return Form.sharegpt
    if {"instruction", "output"} <= there:
        return Form.alpaca
    if {"instruction", "context", "response"} <= there:
        return Form.dolly
    pair = pair_names(record)
    if pair:
        return Form.prompt_completion if any(holds_turns(record[name]) for name in pair) else Form.pairs
    if _is_message(record):
        return Form.message
    if isinstance(record.get("text"), str):
        return Form.text
    stems = [match[1].lower() for name in there if (match := _RIVAL.fullmatch(str(name)))]
    return Form.preference if len(set(stems)) < len(stems) else None


def _is_message(record: Mapping[str, Any]) -> bool:
    """Whether a record is one message of a conversation, the others of which are records of their own."""
    role = record.get("role", record.get("from"))
    has_text = any(isinstance(record.get(name), str) for name in ("text", "content", "value"))
    return has_text and isinstance(role, str) and role.lower() in ROLES


def is_preference(record: Mapping[str, Any]) -> bool:
    """Whether a record holds an answer that lost, or says of its answer whether it is a good one."""
    if any(_LOST.fullmatch(str(name)) and value is not None for name, value in record.items()):
        return True
    if {"prompt", "completion"} <= record.keys() and yes_or_no(record.get("label")) is not None:
        return True
    judged = any(isinstance(record.get(name), bool) for name in _VERDICTS)
    return judged and ("messages" in record or "conversations" in record or pair_names(record) is not None)


def holds_turns(value: Any) -> bool:
    """Whether a field holds turns of a conversation: a list of them or of exchanges, one, or JSON text of turns."""
    if isinstance(value, str):
        if value.lstrip()[:1] not in ("[", "{") or not ('"role"' in value or '"from"' in value):
            return False
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or not value or not all(isinstance(turn, Mapping) for turn in value):
        return False
    return all("role" in turn or "from" in turn for turn in value) or are_exchanges(value)


def are_exchanges(turns: Sequence[Any]) -> bool:
    """Whether each item of a list is a prompt and its answer, as in Capybara's conversations."""
    return all(isinstance(turn, Mapping) and turn.keys() == {"input", "output"} for turn in turns)


def column_of_turns(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The only field that holds conversations, whatever its name; None where there is none, or there are several.

    Pairs under a name such as ``data`` are records in a wrapper, and no exchanges of one conversation.
    """
    found = {
        str(name)
        for record in records
        for name, value in record.items()
        if holds_turns(value) and not (may_hold(str(name)) and are_exchanges(value))
    }
    return found.pop() if len(found) == 1 else None


def pair_names(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The fields of a record's prompt and answer."""
    there = {name for name, value in record.items() if value is not None}
    return next((pair for pair in PAIR_COLUMNS if there.issuperset(pair)), None)


def how_to_rewrite(fields: Sequence[str]) -> str | None:
    """What records with these fields are and how to write them, where that is known of a form that is not read."""
    return next((told for names, told in _TO_REWRITE.items() if set(fields).issuperset(names)), None)


def rival_pairs(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The pairs of fields that most records have, where they are several and nothing says which one is meant."""
    found = Counter(pair for record in records for pair in PAIR_COLUMNS if all(is_filled(record.get(n)) for n in pair))
    often = [pair for pair in PAIR_COLUMNS if 2 * found[pair] >= len(records)]
    return often if len(often) > 1 else []
