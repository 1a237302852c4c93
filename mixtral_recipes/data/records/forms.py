"""The forms records come in, told by the fields one record has."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

# Names people give to prompts and answers, most telling first.
PAIR_COLUMNS = (
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("source", "target"),
)


class Form(StrEnum):
    """What a record is."""

    squad = "SQuAD"
    messages = "messages"
    sharegpt = "sharegpt"
    prompt_completion = "prompt and completion messages"
    alpaca = "alpaca"
    dolly = "instruction, context, response"
    pairs = "prompts and answers"
    text = "documents"
    preference = "preference pairs"


def form_of(record: Mapping[str, Any]) -> Form | None:
    """A record's form; None where its fields are of no known one. A field that is null counts as absent."""
    there = {name for name, value in record.items() if value is not None}
    if {"context", "question", "answers"} <= there or "paragraphs" in there:
        return Form.squad
    if {"chosen", "rejected"} <= there or {"response_0", "response_1"} <= there:
        return Form.preference
    if {"prompt", "completion", "label"} <= there and isinstance(record["label"], bool):
        return Form.preference
    if "messages" in there:
        return Form.messages
    if "conversations" in there:
        return Form.sharegpt
    if {"instruction", "output"} <= there:
        return Form.alpaca
    if {"instruction", "context", "response"} <= there:
        return Form.dolly
    if {"prompt", "completion"} <= there and isinstance(record["prompt"], list):
        return Form.prompt_completion
    if pair_names(record):
        return Form.pairs
    if isinstance(record.get("text"), str):
        return Form.text
    return None


def pair_names(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The fields of a record's prompt and answer."""
    there = {name for name, value in record.items() if value is not None}
    return next((pair for pair in PAIR_COLUMNS if there.issuperset(pair)), None)
